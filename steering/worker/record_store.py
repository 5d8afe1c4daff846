"""Records of requests that run or are preempted, and of ended ones until they are fetched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

from steering.worker.record import RequestRecord

#: Beyond these bounds, records of ended requests that nobody must fetch are forgotten.
MAX_FINISHED_RECORDS: Final = 4096
MAX_FINISHED_BYTES: Final = 256 * 2**20


class RecordStore:
    """Keeps the records of a worker's requests by request id, and of ended ones by key.

    Beyond `MAX_FINISHED_RECORDS` or `MAX_FINISHED_BYTES` the records of ended requests that nobody
    is sure to fetch (``plan.awaited`` is False) are forgotten, oldest first.
    """

    def __init__(self) -> None:
        self._running: dict[str, RequestRecord] = {}
        self._paused: dict[str, RequestRecord] = {}
        self._awaited: dict[tuple[str, int], RequestRecord] = {}
        # Each with its size when it came here: what a pass under way still adds is not counted.
        self._finished: OrderedDict[tuple[str, int], tuple[RequestRecord, int]] = OrderedDict()
        self._finished_bytes = 0

    def open(self, req_id: str, make: Callable[[], RequestRecord]) -> RequestRecord:
        """The record of a request that enters the batch; its old one if it was preempted."""
        record = self._paused.pop(req_id, None) or make()
        self._running[req_id] = record
        return record

    def running(self, req_id: str) -> RequestRecord | None:
        """The record of a request that is in the batch; None if it keeps none."""
        return self._running.get(req_id)

    def pause(self, req_id: str) -> None:
        """The request was preempted; its record waits for it."""
        if (record := self._running.pop(req_id, None)) is not None:
            self._paused[req_id] = record

    def close(self, req_id: str) -> None:
        """The request ended; its record waits to be fetched."""
        record = self._running.pop(req_id, None) or self._paused.pop(req_id, None)
        if record is None:
            return
        key = record.plan.key, record.child
        if record.plan.awaited:
            self._awaited[key] = record
            return
        self._pop_finished(key)
        nbytes = record.nbytes
        self._finished[key] = record, nbytes
        self._finished_bytes += nbytes
        while (
            len(self._finished) > MAX_FINISHED_RECORDS or self._finished_bytes > MAX_FINISHED_BYTES
        ):
            self._pop_finished(next(iter(self._finished)))

    def take(self, key: str, child: int) -> RequestRecord | None:
        """Fetch and forget one record, whether or not its request has left the batch.

        Returns:
            The record; None if there is none under the key, or no longer.
        """
        for records in (self._running, self._paused):
            for req_id, record in records.items():
                if (record.plan.key, record.child) == (key, child):
                    del records[req_id]
                    return record
        return self._awaited.pop((key, child), None) or self._pop_finished((key, child))

    @property
    def clients(self) -> int:
        """How many records a client may fetch: all but internal ones."""
        return sum(not record.plan.internal for record in self._all())

    def streaming(self) -> dict[str, RequestRecord]:
        """The records in the batch whose reads are streamed, by request id."""
        return {
            req_id: record
            for req_id, record in self._running.items()
            if record.plan.read is not None and record.plan.read.stream
        }

    def __len__(self) -> int:
        return sum(1 for _ in self._all())

    def _all(self) -> Iterator[RequestRecord]:
        for records in (self._running, self._paused, self._awaited):
            yield from records.values()
        for record, _ in self._finished.values():
            yield record

    def _pop_finished(self, key: tuple[str, int]) -> RequestRecord | None:
        record, nbytes = self._finished.pop(key, (None, 0))
        self._finished_bytes -= nbytes
        return record
