"""Final hidden states that a worker keeps of a study's run until it is compared with another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Keep:
    """Keep a run's final hidden states, as the model returns them, under a name.

    They outlive the request: whoever asked for them must have them forgotten, see
    `steering.worker.captures`.

    Attributes:
        key: the name, distinct over all runs.
        start: the first position.
        stop: one past the last.
    """

    key: str
    start: int
    stop: int

    def to_wire(self) -> list[Any]:
        """What to keep, in plain types for a plan."""
        return [self.key, self.start, self.stop]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Keep:
        """The inverse of `to_wire`."""
        return cls(*wire)
