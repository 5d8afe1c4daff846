"""Streams that are kept of a study's texts until they are compared.

They lie on the host, so that no study takes memory from the KV cache: pinned beside an accelerator,
to which copies go on the compute stream. A copy back on that stream finds what the pass wrote, and
nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from sae.arrays import BoolArray, IntArray
from steering.request.keep import Keep

#: Host memory of an empty capture, roughly.
_EMPTY_BYTES: Final = 512


class Capture:
    """One run's streams at some places, by position.

    A position that is computed again, after a preemption, say, replaces itself.
    """

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self._rows: dict[str, Tensor] = {}
        self._filled: dict[str, BoolArray] = {
            place: np.zeros(keep.stop - keep.start, dtype=np.bool_) for place in keep.places
        }

    def put(self, place: str, start: int, stream: Tensor) -> None:
        """Keep rows of consecutive positions.

        Args:
            place: where they come from.
            start: position of the first, within the keep's.
            stream: ``[n, d]`` on the model's device; copied on its stream.
        """
        length, where = len(self._filled[place]), start - self.keep.start
        rows = self._rows.get(place)
        if rows is None:
            rows = self._rows[place] = torch.empty(
                *(length, stream.shape[1]), dtype=stream.dtype, pin_memory=stream.is_cuda
            )
        rows[where : where + len(stream)].copy_(stream, non_blocking=True)
        self._filled[place][where : where + len(stream)] = True

    def rows(self, place: str) -> Tensor | None:
        """``[n, d]`` on the host, in the model's dtype; None while a position is missing."""
        return self._rows[place] if self._filled[place].all() else None

    @property
    def nbytes(self) -> int:
        """Memory held, roughly."""
        return _EMPTY_BYTES + sum(rows.nbytes for rows in self._rows.values())


class Captures:
    """The captures of one worker by key, and which rows of the pass under way belong to them."""

    def __init__(self) -> None:
        self._kept: dict[str, Capture] = {}
        self._running: dict[str, Capture] = {}
        # Of the pass under way: a capture, its first position there, and its rows in the batch.
        self._in_pass: list[tuple[Capture, int, slice]] = []

    def open(self, req_id: str, keep: Keep) -> None:
        """A request enters the batch, for the first time or again."""
        self._running[req_id] = self._kept.setdefault(keep.key, Capture(keep))

    def close(self, req_id: str) -> None:
        """A request left the batch; what was kept of it stays."""
        self._running.pop(req_id, None)

    def begin(
        self,
        req_ids: Sequence[str],
        query_start_loc: IntArray,
        first_positions: Callable[[], Mapping[str, int]],
    ) -> None:
        """Lay out a forward pass.

        Args:
            req_ids: the input batch's requests, in the runner's order.
            query_start_loc: ``[num_reqs + 1]`` offsets of their tokens.
            first_positions: the position of each one's first token; asked only if one is kept.
        """
        self._in_pass = []
        if not self._running:
            return
        positions = first_positions()
        starts = query_start_loc.tolist()
        for req_id, start, stop in zip(req_ids, starts, starts[1:], strict=False):
            capture = self._running.get(req_id)
            if capture is None:
                continue
            first, keep = positions[req_id], capture.keep
            low, high = max(keep.start, first), min(keep.stop, first + stop - start)
            if low < high:
                rows = slice(start + low - first, start + high - first)
                self._in_pass.append((capture, low, rows))

    def put(self, place: str, stream: Tensor) -> None:
        """Keep the pass's rows of whoever asked for this place.

        Args:
            place: see `Keep`.
            stream: ``[>= num_tokens, d]`` in the batch's order.
        """
        for capture, start, rows in self._in_pass:
            if place in capture.keep.places:
                capture.put(place, start, stream[rows])

    def end(self) -> None:
        """The forward pass is over."""
        self._in_pass = []

    def rows(self, key: str, place: str) -> Tensor | None:
        """What is kept under a key, see `Capture.rows`; None if nothing is."""
        capture = self._kept.get(key)
        return None if capture is None else capture.rows(place)

    def forget(self, keys: Iterable[str]) -> None:
        """Forget what was kept under these keys, and what requests that still run would add."""
        for key in keys:
            self._kept.pop(key, None)
        self._running = {
            req_id: capture
            for req_id, capture in self._running.items()
            if capture.keep.key in self._kept
        }

    @property
    def nbytes(self) -> int:
        """Host memory held, roughly."""
        return sum(capture.nbytes for capture in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)
