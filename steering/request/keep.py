"""What a worker keeps of a study's run until it is compared with another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

#: The place of the final hidden states, as the model returns them: behind its last norm.
FINAL: Final = "final"


@dataclass(frozen=True)
class Keep:
    """Streams of some positions are kept under a name, whatever becomes of the request.

    Whoever asked for it has them forgotten: see `steering.worker.captures`.

    Attributes:
        key: the name, distinct over all runs.
        start: the first position.
        stop: one past the last.
        places: `FINAL`, or hook points of loaded SAEs.
    """

    key: str
    start: int
    stop: int
    places: tuple[str, ...] = (FINAL,)

    def to_wire(self) -> list[Any]:
        """Plain types for a plan."""
        return [self.key, self.start, self.stop, list(self.places)]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Keep:
        """The inverse of `to_wire`."""
        key, start, stop, places = wire
        return cls(key, start, stop, tuple(places))
