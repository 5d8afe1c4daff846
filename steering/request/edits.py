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

    Attributes:
        sae: name of the SAE.
        feature: index of the feature.
        op: one of `limits.OPS`.
        value: as the request states it; 0.0 for ``ablate``.
        unit: the unit of ``value``, "raw" or "max_act".
        effective_value: ``value`` in raw units; for ``scale`` the factor.
        positions: the tokens that the edit covers.
        when: its conditions; None if it has none.
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
        """A tuple for comparison: edits with equal ones have the same effect.

        ``ablate`` is a clamp to zero, and values are compared as the float32 numbers that the
        device computes with, so ``max_act`` and the equal raw value agree.
        """
        op = "clamp" if self.op == "ablate" else self.op
        positions = self.positions
        return (
            self.sae,
            self.feature,
            op,
            float32(self.effective_value) + 0.0,  # -0.0 and 0.0 are one value
            positions.prompt,
            positions.generation,
            positions.special_tokens,
            positions.start,
            positions.int32_end,
            () if self.when is None else self.when.canonical(),
        )
