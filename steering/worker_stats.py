"""The numbers that workers give to ``/metrics``: each is a field here, with what it means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

#: Keys of a field's metadata: what it means, and whether it is a counter.
HELP: Final = "help"
GROWS: Final = "grows"


def _gauge(meaning: str) -> Any:
    return field(default=0, metadata={HELP: meaning, GROWS: False})


def _counter(meaning: str) -> Any:
    return field(default=0, metadata={HELP: meaning, GROWS: True})


@dataclass(frozen=True)
class WorkerStats:
    """Gauges as they are now, and counters since anyone last asked."""

    slots_in_use: int = _gauge("Requests being steered.")
    slots_capacity: int = _gauge("Requests that can be steered at once.")
    rows_in_use: int = _gauge("Features whose rows running requests hold on the device.")
    rows_capacity: int = _gauge("Rows that fit on the device.")
    results_held: int = _gauge(
        "Reports and reads that the workers hold, of running requests or until they are fetched, "
        "and texts of studies until they are compared."
    )
    edited_tokens: int = _counter("Tokens edited, each time that one passes a hook point.")
    skipped_tokens: int = _counter(
        "Tokens that edits left alone at a hook point as attention sinks."
    )
    op_seconds: float = _counter(
        "Time that the workers' processors spent in edits and reads at hook points; on a GPU this "
        "is the time of launching them, and a replayed CUDA graph adds none."
    )

    @classmethod
    def total(cls, workers: Iterable[Mapping[str, float]]) -> WorkerStats:
        """The sum over workers of what each reported, by the names of the fields here."""
        reported = list(workers)
        sums: dict[str, Any] = {
            f.name: sum(worker.get(f.name, 0) for worker in reported) for f in fields(cls)
        }
        return cls(**sums)
