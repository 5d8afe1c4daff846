"""Takes what passes found off the device, without making it wait, and on to the records.

Kernels and the full path write into persistent buffers, since nothing may be allocated inside a
CUDA graph. After a pass the rows of requests that asked for them are copied to pinned memory on the
same stream. The copies are kept as they are and taken apart by request later: many passes at a
time, or when a request's results are fetched. This happens in the order in which the copies were
made, so that what was found later replaces what was found before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from threading import RLock
from typing import Any, Final
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from sae.arrays import IntArray
from steering.worker.record import RequestRecord

#: Copies are taken apart once there are this many, or this many bytes of them.
_MOST_COPIES: Final = 32
_MOST_BYTES: Final = 64 * 2**20

#: This many records are looked for in the same copies one by one; then the copies are taken apart.
_MOST_LOOKS: Final = 2

#: A method of `RequestRecord` that takes positions ``[n]`` and columns ``[n, ...]``.
Put = Callable[..., None]


@dataclass(frozen=True)
class _Copy:
    """A copy under way, or done.

    Attributes:
        copied: a ``torch.cuda.Event`` that follows the copy; None on a CPU.
        put: the method by which a record takes its rows.
        record_np: ``[n]`` the number of each row's record.
        columns: ``[n, ...]`` each, in host memory; positions first.
    """

    copied: Any
    put: Put
    record_np: IntArray
    columns: tuple[Tensor, ...]

    @property
    def kind(self) -> tuple[Put, list[tuple[int, ...]]]:
        """What two copies must have in common to be handed on together."""
        return self.put, [tuple(column.shape[1:]) for column in self.columns]

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return sum(column.nbytes for column in self.columns)


class PassReports:
    """Copies of one worker's passes, oldest first."""

    def __init__(self) -> None:
        self._copies: deque[_Copy] = deque()
        self._bytes = 0
        self._looks = 0  # how many records were looked for in the copies that there are now
        # The thread that takes sampled tokens off the device, if there is one, takes copies apart.
        self._lock = RLock()
        # Weak, since a record may be forgotten before its copies are taken apart.
        self._records: WeakValueDictionary[int, RequestRecord] = WeakValueDictionary()

    def follow(self, record: RequestRecord) -> None:
        """From now on, hand this record the rows that have its number."""
        with self._lock:
            self._records[record.number] = record

    def copy(self, put: Put, record_np: IntArray, *columns: Tensor) -> None:
        """Start copying rows to the host.

        Args:
            put: the method by which a record takes them: `RequestRecord.put_edits`, `put_reads` or
                `put_stream`.
            record_np: ``[n]`` the number of each row's record.
            columns: ``[n, ...]`` each, on the device, positions first; nothing may write to them
                any more.
        """
        copied = None
        if columns[0].is_cuda:
            columns = tuple(_to_pinned(column) for column in columns)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        with self._lock:
            self._looks = 0
            self._copies.append(_Copy(copied, put, record_np, columns))
            self._bytes += self._copies[-1].nbytes

    def settle(self) -> None:
        """Hand finished copies to their records once there are many; never wait."""
        if len(self._copies) >= _MOST_COPIES or self._bytes >= _MOST_BYTES:
            self.settle_all()

    def settle_all(self) -> None:
        """Hand every finished copy to its records; never wait."""
        with self._lock:
            self._settle_finished()

    def _settle_finished(self) -> None:
        done = [self._copies.popleft() for _ in range(self._num_finished())]
        self._bytes -= sum(copy.nbytes for copy in done)
        for (put, _), group in groupby(done, key=lambda copy: copy.kind):
            copies = list(group)
            number = np.concatenate([copy.record_np for copy in copies])
            columns = [
                np.concatenate([column.numpy() for column in column_of_each])
                for column_of_each in zip(*(copy.columns for copy in copies), strict=True)
            ]
            order = np.argsort(number, kind="stable")
            number, columns = number[order], [column[order] for column in columns]
            starts = np.flatnonzero(np.diff(number, prepend=-1))
            for start, stop in zip(starts, [*starts[1:], len(number)], strict=True):
                record = self._records.get(int(number[start]))
                if record is not None:
                    put(record, *(column[start:stop] for column in columns))

    def settle_one(self, record: RequestRecord) -> None:
        """Hand one record its rows of every finished copy, since it is about to be summed up.

        It is given no others afterwards. If a request's results are fetched, its token has been
        sampled from the last pass that counts, and that pass was copied before.
        """
        with self._lock:
            if record.number not in self._records:
                return
            self._looks += 1
            if self._looks > _MOST_LOOKS:  # many have ended with one pass
                self._settle_finished()
            del self._records[record.number]
            for copy in list(self._copies)[: self._num_finished()]:
                where = np.flatnonzero(copy.record_np == record.number)
                if len(where):
                    copy.put(record, *(column.numpy()[where] for column in copy.columns))

    def _num_finished(self) -> int:
        for i, copy in enumerate(self._copies):
            if copy.copied is not None and not copy.copied.query():
                return i
        return len(self._copies)


def _to_pinned(source: Tensor) -> Tensor:
    target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return target.copy_(source, non_blocking=True)
