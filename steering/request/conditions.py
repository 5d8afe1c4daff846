"""Conditions of edits (``when``) and of the answer's end (``stop_when``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

ABOVE: Final = "above"
BELOW: Final = "below"

TOKEN: Final = "token"
SO_FAR: Final = "so_far"
PROMPT: Final = "prompt"
#: The scope of a condition of ``stop_when``: each generated token by itself.
STOP: Final = "stop"


@dataclass(frozen=True, order=True)
class Condition:
    """A feature's activation f, before the edits of its own hook point, against a threshold.

    Attributes:
        sae: name of the SAE.
        feature: its index.
        sense: ABOVE: f > threshold; BELOW: f <= threshold.
        threshold: in raw units, of float32 precision.
        scope: TOKEN, SO_FAR, PROMPT or STOP.
    """

    sae: str
    feature: int
    sense: str
    threshold: float
    scope: str

    def canonical(self) -> tuple[Any, ...]:
        """Equal tuples hold on equal tokens."""
        return (self.sae, self.feature, self.sense, self.threshold, self.scope)


@dataclass(frozen=True)
class When:
    """Conditions of an edit, sorted and distinct: all of them must hold, or ``any`` one.

    Attributes:
        conditions: at least one.
        any: whether one that holds is enough; False for a single condition.
        path: where the request states them; it takes no part in comparisons.
    """

    conditions: tuple[Condition, ...]
    any: bool
    path: str = field(compare=False)

    def canonical(self) -> tuple[Any, ...]:
        """Equal tuples hold on equal tokens."""
        return (self.any, *(condition.canonical() for condition in self.conditions))
