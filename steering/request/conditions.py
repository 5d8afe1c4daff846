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
    """A comparison of a feature's activation f with a threshold.

    f is taken before the edits of its own hook point.

    Attributes:
        sae: name of the SAE.
        feature: index of the feature.
        sense: ABOVE holds if f > threshold, BELOW if f <= threshold.
        threshold: in raw units, of float32 precision.
        scope: TOKEN, SO_FAR, PROMPT or STOP.
    """

    sae: str
    feature: int
    sense: str
    threshold: float
    scope: str

    def canonical(self) -> tuple[Any, ...]:
        """A tuple for comparison: conditions with equal ones hold on the same tokens."""
        return (self.sae, self.feature, self.sense, self.threshold, self.scope)


@dataclass(frozen=True)
class When:
    """The conditions of an edit.

    Attributes:
        conditions: at least one, sorted and distinct.
        any: whether it is enough that one of them holds, else all must; False for a single one.
        path: where the request states them; it takes no part in comparisons.
    """

    conditions: tuple[Condition, ...]
    any: bool
    path: str = field(compare=False)

    def canonical(self) -> tuple[Any, ...]:
        """A tuple for comparison: equal ones hold on the same tokens."""
        return (self.any, *(condition.canonical() for condition in self.conditions))
