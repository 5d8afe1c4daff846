"""The tokens of a pass that a study's probes look at, and what the probes take from them.

Indices are named as in `batch_work`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae.arrays import IntArray
from sae.sae import SAE
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SPECIAL,
    PlannedEdit,
)
from steering.request.probe_plan import PlannedPool, PlannedStream, Window
from steering.worker.ops import batched
from steering.worker.ops.batched import Stream
from steering.worker.ops.buffers import Buffers
from steering.worker.pass_reports import PassReports
from steering.worker.record import RequestRecord


@dataclass(frozen=True)
class PooledTokens:
    """One request's tokens in a full encode, whose activations are summed up.

    Attributes:
        record: where they are summed up.
        probe: index of the plan's probe that asks for it.
        planned: that probe.
        in_encode: ``[r]`` int64, or a slice.
        in_part: ``[r]`` int64, or a slice.
    """

    record: RequestRecord
    probe: int
    planned: PlannedPool
    in_encode: slice | Tensor
    in_part: slice | Tensor

    def observe(self, stream: Stream, f_all: Tensor, sae: SAE) -> None:
        """Add the tokens' activations to the record's sums.

        Args:
            stream: the stream of the part.
            f_all: ``[m, d_sae]`` float32, the whole encode.
            sae: the SAE that was encoded.
        """
        in_part = self.in_part
        covered = _covered(
            self.planned.windows,
            stream.position[in_part],
            stream.special[in_part],
            self.record.plan.prompt_len,
        )
        sink_norm = sae.card.sink_norm
        if sink_norm is not None:
            covered &= ~(stream.norm[in_part] > sink_norm)
        scale = None
        if self.planned.scaled and sae.card.normalize_activations != "none":
            _, scale = sae.normalize(stream.x[in_part])
        f = f_all[self.in_encode]
        pooled = self.record.pooled(self.probe, sae.card, f.device)
        pooled.observe(stream.position[in_part], covered, f, scale)


@dataclass
class Asked:
    """The changes ``f' - f`` that the edits of a part ask for; ``[n, e]`` float32 each.

    Attributes:
        here: by the edits that are added here; None if there are none.
        elsewhere: by the edits that are read here and added elsewhere; None if there are none.
    """

    here: Tensor | None = None
    elsewhere: Tensor | None = None


@dataclass(frozen=True)
class KeptTokens:
    """One request's tokens, whose stream is kept.

    Attributes:
        record: where the stream goes.
        probe: index of the plan's probe that asks for it.
        planned: that probe.
        in_batch: ``[r]`` int64.
        in_part: ``[r]`` int64, or a slice.
        columns: ``[k]`` int64, columns of the request's edits of the probe's SAE in `Asked`.
        elsewhere: whether they are columns of ``Asked.elsewhere``, or else of ``Asked.here``.
    """

    record: RequestRecord
    probe: int
    planned: PlannedStream
    in_batch: Tensor
    in_part: slice | Tensor
    columns: Tensor
    elsewhere: bool

    def keep(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        asked: Asked,
        buffers: Buffers,
        reports: PassReports,
    ) -> None:
        """Start copying the stream as the edits left it.

        Args:
            hidden_states: ``[num_tokens, d_in]`` model dtype.
            residual: the same shape, or None.
            asked: what the part's edits ask for.
            buffers: the buffers of the hook point.
            reports: takes the copies.
        """
        stream = batched.gather_stream(hidden_states, residual, self.in_batch, buffers)
        covered = _covered(
            self.planned.windows, stream.position, stream.special, self.record.plan.prompt_len
        )
        square = stream.x.new_zeros(len(stream.x))
        change = asked.elsewhere if self.elsewhere else asked.here
        if change is not None and len(self.columns):
            square = change[self.in_part][:, self.columns].square().sum(dim=1)
        reports.copy(
            RequestRecord.put_stream,
            np.full(len(square), self.record.number),
            stream.position,
            torch.full_like(stream.position, self.probe),
            covered,
            stream.x,
            square,
        )


def pooled_tokens(
    record: RequestRecord,
    probe: int,
    planned: PlannedPool,
    in_encode: IntArray,
    in_part: IntArray,
    device: torch.device,
) -> PooledTokens:
    """Lay out one request's tokens, ``[r]`` indices each; see `PooledTokens`."""
    return PooledTokens(record, probe, planned, _index(in_encode, device), _index(in_part, device))


def kept_tokens(
    record: RequestRecord,
    probe: int,
    planned: PlannedStream,
    edits: Sequence[tuple[int, PlannedEdit]],
    elsewhere: Sequence[tuple[int, PlannedEdit]],
    in_batch: IntArray,
    in_part: IntArray,
    device: torch.device,
) -> KeptTokens:
    """Lay out one request's tokens; see `KeptTokens`.

    Args:
        record: where the stream goes.
        probe: index of the probe in the plan.
        planned: the probe.
        edits: ``(index in the request, edit)`` of the request's edits that are added here.
        elsewhere: the same of its edits that are read here and added at other hook points.
        in_batch: ``[r]``.
        in_part: ``[r]``.
        device: where the stream is.
    """
    here, there = (
        [column for column, (_, edit) in enumerate(of_place) if edit.sae == planned.sae]
        for of_place in (edits, elsewhere)
    )
    return KeptTokens(
        record,
        probe,
        planned,
        torch.from_numpy(in_batch.astype(np.int64)).to(device),
        _index(in_part, device),
        torch.tensor(there or here, dtype=torch.int64, device=device),
        bool(there),
    )


def _covered(
    windows: Sequence[Window], position: Tensor, special: Tensor, prompt_len: int
) -> Tensor:
    """``[n]`` bool, whether some window covers the token; sinks are not considered."""
    covered = torch.zeros_like(special)
    for coverage, start, end in windows:
        low = start if coverage & COVERS_PROMPT else max(start, prompt_len)
        high = end if coverage & COVERS_GENERATION else min(end, prompt_len)
        inside = (position >= low) & (position < high)
        covered |= inside if coverage & COVERS_SPECIAL else inside & ~special
    return covered


def _index(index: IntArray, device: torch.device) -> slice | Tensor:
    """The indices ``[r]``, as a slice if they are neighbours, so that nothing is copied."""
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == len(index):
        return slice(first, last + 1)
    return torch.from_numpy(index.astype(np.int64)).to(device)
