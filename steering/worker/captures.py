"""Final hidden states of a study's texts, kept until they are compared.

They lie on the host, so that no study takes memory from the KV cache. If the model runs on an
accelerator, they are copied to pinned memory on the compute stream. Nobody waits for the copies: a
pass's rows are copied before its next token is sampled, and whoever asks for them has seen that
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sae.arrays import IntArray
from steering.request.keep import Keep


class Capture:
    """One run's final hidden states by position; a position computed again replaces its row."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self._rows: Tensor | None = None
        self._filled = np.zeros(keep.stop - keep.start, dtype=np.bool_)

    def put(self, start: int, hidden_states: Tensor) -> None:
        """Keep rows of consecutive positions.

        Args:
            start: position of the first row; all positions lie within those of the `Keep`.
            hidden_states: ``[n, d]`` on the model's device; copied on its stream.
        """
        if self._rows is None:
            self._rows = torch.empty(
                *(len(self._filled), hidden_states.shape[1]),
                dtype=hidden_states.dtype,
                pin_memory=hidden_states.is_cuda,
            )
        where = slice(start - self.keep.start, start - self.keep.start + len(hidden_states))
        self._rows[where].copy_(hidden_states, non_blocking=True)
        self._filled[where] = True

    @property
    def rows(self) -> Tensor | None:
        """``[n, d]`` on the host, in the model's dtype; None while a position is missing."""
        return self._rows if self._filled.all() else None


class Captures:
    """The captures of one worker by key, and which rows of the pass under way belong to them."""

    def __init__(self) -> None:
        self._kept: dict[str, Capture] = {}
        self._running: dict[str, Capture] = {}
        # For the pass under way: a capture, the first of its positions there, and their rows.
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
            req_ids: the requests of the input batch, in the runner's order.
            query_start_loc: ``[num_reqs + 1]`` offsets of their tokens.
            first_positions: returns the position of each request's first token in the pass; called
                only if some running request is captured.
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

    def put(self, hidden_states: Tensor) -> None:
        """Keep those rows of the pass that some request asked to have kept.

        Args:
            hidden_states: ``[>= num_tokens, d]`` in the batch's order.
        """
        for capture, start, rows in self._in_pass:
            capture.put(start, hidden_states[rows])

    def end(self) -> None:
        """The forward pass is over."""
        self._in_pass = []

    def rows(self, key: str) -> Tensor | None:
        """The rows that are kept under a key; None if there are none, or not yet all of them."""
        capture = self._kept.get(key)
        return None if capture is None else capture.rows

    def forget(self, keys: Iterable[str]) -> None:
        """Forget what was kept under these keys, and what requests that still run would add."""
        for key in keys:
            self._kept.pop(key, None)
        self._running = {
            req_id: capture
            for req_id, capture in self._running.items()
            if capture.keep.key in self._kept
        }

    def __len__(self) -> int:
        return len(self._kept)
