"""One intervention with every default filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steering.request.conditions import When
from steering.request.float32 import float32
from steering.request.positions import Positions


@dataclass(frozen=True)
class Edit:
    """What becomes of one feature, on which tokens, under which conditions.

    ``value`` is what the request said (0.0 for ``ablate``); ``effective_value`` is in raw units.
    """

    sae: str
    feature: int
    op: str
    value: float
    unit: str
    effective_value: float
    positions: Positions
    when: When | None = None

    def canonical(self) -> tuple[Any, ...]:
        """The edit's effect: equal tuples edit equally.

        ``ablate`` is a clamp to zero, and values are compared as the float32 the device computes
        with, so ``max_act`` and the equal raw value agree.
        """
        op = "clamp" if self.op == "ablate" else self.op
        where = self.positions
        return (
            self.sae,
            self.feature,
            op,
            float32(self.effective_value) + 0.0,  # -0.0 and 0.0 are one value
            where.prompt,
            where.generation,
            where.special_tokens,
            where.start,
            where.end,
            () if self.when is None else self.when.canonical(),
        )
