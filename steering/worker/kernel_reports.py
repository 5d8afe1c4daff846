"""Reports of passes that ran in the kernel: off the device without making it wait.

The kernel writes each edit's activation into a persistent buffer, since nothing may be allocated
inside a CUDA graph. After the pass the rows of reporting requests are copied to pinned memory on
the same stream, and read once that copy has happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.arrays import IntArray
from steering.worker.record import RequestRecord


@dataclass(frozen=True)
class ReportPart:
    """One request's share of a copy.

    Attributes:
        record: where it goes.
        columns: the request's edits at this hook point, as indices in the request.
        where: ``[n]`` rows of the copy that are its tokens.
    """

    record: RequestRecord
    columns: list[int]
    where: IntArray


@dataclass(frozen=True)
class _Copy:
    """A copy under way: ``[n]`` positions and ``[n, width]`` activations in host memory."""

    copied: Any  # torch.cuda.Event, or None on a CPU
    position: Tensor
    f: Tensor
    parts: Sequence[ReportPart]


class KernelReports:
    """Copies of one worker's kernel reports, oldest first."""

    def __init__(self) -> None:
        self._copies: deque[_Copy] = deque()

    def copy(self, position: Tensor, f: Tensor, parts: Sequence[ReportPart]) -> None:
        """Start copying ``[n]`` positions and ``[n, width]`` activations to the host."""
        copied = None
        if f.is_cuda:
            position = _to_pinned(position)
            f = _to_pinned(f)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._copies.append(_Copy(copied, position, f, parts))

    def drain(self, wait: bool) -> None:
        """Hand finished copies to their records; ``wait`` for those that are not finished."""
        while self._copies:
            copy = self._copies[0]
            if copy.copied is not None and not copy.copied.query():
                if not wait:
                    return
                copy.copied.synchronize()
            self._copies.popleft()
            position, f = copy.position.numpy(), copy.f.numpy()
            for part in copy.parts:
                own = f[part.where, : len(part.columns)]
                skipped = np.isneginf(own)
                covered = ~(np.isnan(own) | skipped)
                part.record.put_edits(
                    part.columns,
                    position[part.where],
                    np.where(covered, own, 0.0).astype(np.float32),
                    covered,
                    skipped,
                )


def _to_pinned(source: Tensor) -> Tensor:
    target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return target.copy_(source, non_blocking=True)
