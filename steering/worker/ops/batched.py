"""The edit over a whole batch in torch: wherever a full encode is due or no kernel runs.

A batch mostly stays the same from pass to pass, so its edits are compiled once (`compile_edits`)
into tensors that fit its tokens, and a pass is some twenty calls on them: which edits cover which
tokens, what the activations are, what the delta is. The full path shares all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sae.arrays import IntArray
from sae.normalization import LAYER_NORM_EPS
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SINKS,
    COVERS_SPECIAL,
    OP_ADD,
    OP_CAP,
    OP_FLOOR,
    OP_SCALE,
)
from steering.worker.rows import (
    NORM_CONSTANT,
    NORM_LAYER,
    P_BIAS,
    P_DECODER_SCALE,
    P_ENC_SUM,
    P_GAIN,
    P_GATE_BIAS,
    P_NORM,
    P_SINK,
    P_THRESHOLD,
    RowPool,
)
from steering.worker.slots import E_COVERAGE, E_END, E_OP, E_ROW, E_START, EditTable

#: Elements of rows that a batch may keep gathered between passes, for each of the two matrices.
_GATHERED_ELEMENTS = 4 * 2**20


@dataclass(frozen=True)
class Stream:
    """The stream of the tokens that something is to happen to.

    Attributes:
        token: index in the batch: a slice, or ``[n]`` int64.
        x: ``[n, d_in]`` float32, hidden states plus residual.
        position: ``[n]`` int64.
        special: ``[n]`` bool, a special token or the sequence's first.
    """

    token: slice | Tensor
    x: Tensor
    position: Tensor
    special: Tensor

    @cached_property
    def norm(self) -> Tensor:
        """``[n]`` float32, Euclidean norm of ``x``."""
        norm: Tensor = torch.linalg.vector_norm(self.x, dim=1)
        return norm


@dataclass(frozen=True)
class InputNorms:
    """What activations need where some edit's SAE normalises its input; all ``[n, e]``.

    Attributes:
        layer: bool, by layer norm.
        constant: bool, to a constant norm.
        enc_sum: float32, sum of the encoder row.
    """

    layer: Tensor
    constant: Tensor
    enc_sum: Tensor


@dataclass(frozen=True)
class EncoderGate:
    """Where ``f = gain * z + bias`` if that exceeds ``threshold``, else 0; all ``[n, e]`` float32.

    Attributes:
        gate_bias: ``z + gate_bias`` must be positive too; None where it always is.
        zero: ``[]``.
    """

    gain: Tensor
    bias: Tensor
    threshold: Tensor
    gate_bias: Tensor | None
    zero: Tensor


@dataclass(frozen=True)
class Change:
    """``f' - f = factor * f + offset`` kept within bounds; all ``[n, e]`` float32.

    Clamp is ``v - f``, add ``v``, scale ``(v - 1) f``; floor is ``v - f`` where that is positive
    and cap where it is negative. For an edit without bounds they are infinite; both are None where
    no edit has any.
    """

    factor: Tensor
    offset: Tensor
    least: Tensor | None
    most: Tensor | None


@dataclass(frozen=True)
class RunRows:
    """Rows by runs of neighbouring tokens that name the same ones: a product for each run.

    Attributes:
        bounds: ``(start, stop)`` of each run; together they are ``[0, n)``.
        row: ``[runs, e]`` int64, rows in the pool.
        W_enc: ``[runs, e, d_in]`` float32, gathered; None where that would take too much room.
        W_dec: the same of the decoder.
    """

    bounds: list[tuple[int, int]]
    row: Tensor
    W_enc: Tensor | None
    W_dec: Tensor | None


@dataclass(frozen=True)
class CompiledEdits:
    """The edits of ``n`` tokens, ``e`` the most that one of them has; absent ones cover nothing.

    Attributes:
        low: ``[n, e]`` int64, first position that the edit covers.
        high: ``[n, e]`` int64, the one after the last.
        covers_special: ``[n, e]`` bool, special tokens too.
        sink_norm: ``[n, e]`` float32, the edit spares tokens whose norm exceeds it; None where it
            is infinite for all.
        decoder_scale: ``[n, e]`` float32; None where it is one for all.
        norms: None where no SAE normalises its input.
    """

    low: Tensor
    high: Tensor
    covers_special: Tensor
    sink_norm: Tensor | None
    gate: EncoderGate
    change: Change
    decoder_scale: Tensor | None
    norms: InputNorms | None
    rows: RunRows


@dataclass(frozen=True)
class Coverage:
    """Which edits cover which tokens.

    Attributes:
        covered: ``[n, e]`` bool, the edit applies to the token.
        skipped: ``[n, e]`` bool, it would but for a sink; None where there is no limit to norms.
    """

    covered: Tensor
    skipped: Tensor | None


def gather_stream(
    hidden_states: Tensor,
    residual: Tensor | None,
    token: slice | Tensor,
    positions: Tensor,
    input_ids: Tensor,
    is_special: Tensor,
) -> Stream:
    """The float32 stream and the facts of ``token``; shapes as in :class:`Stream`."""
    x = hidden_states[token].float()
    if residual is not None:
        x = x + residual[token].float()
    position = positions[token]
    return Stream(
        token=token,
        x=x,
        position=position,
        special=is_special.index_select(0, input_ids[token]) | (position == 0),
    )


def compile_edits(
    slot_np: IntArray, width: int, table: EditTable, rows: RowPool, prompt_len: Tensor
) -> CompiledEdits:
    """The edits of tokens in these slots, for as long as the slots are not rewritten.

    Args:
        slot_np: ``[n]`` slot of each token.
        width: the most edits that one of the slots has, at least 1.
        table: every slot's edits.
        rows: the pool.
        prompt_len: ``[num_slots]`` int32.
    """
    device = prompt_len.device
    slots_np, of_token_np = np.unique(slot_np, return_inverse=True)
    slots = torch.from_numpy(slots_np.astype(np.int64)).to(device)
    of_token = torch.from_numpy(of_token_np).to(device)
    ints = table.ints[slots, :width].long()  # [slots, e, NUM_INTS]
    coverage, op, row = ints[..., E_COVERAGE], ints[..., E_OP], ints[..., E_ROW]
    value = table.value[slots, :width]
    params = rows.params[row]  # [slots, e, NUM_PARAMS]
    exists = torch.arange(width, device=device) < table.count[slots][:, None]
    low, high = window(
        coverage, ints[..., E_START], ints[..., E_END], prompt_len[slots].long()[:, None]
    )

    def spread(by_slot: Tensor) -> Tensor:
        return by_slot[of_token]

    def unless(trivial: Tensor, by_slot: Tensor) -> Tensor | None:
        return None if bool((trivial | ~exists).all()) else spread(by_slot)

    sink_norm = torch.where(coverage & COVERS_SINKS != 0, torch.inf, params[..., P_SINK])
    is_floor, is_cap = op == OP_FLOOR, op == OP_CAP
    least = torch.where(is_floor, 0.0, -torch.inf)
    most = torch.where(is_cap, 0.0, torch.inf)
    norm = params[..., P_NORM]
    layer, constant = (norm == NORM_LAYER) & exists, (norm == NORM_CONSTANT) & exists
    gate_bias, scale = params[..., P_GATE_BIAS], params[..., P_DECODER_SCALE]
    return CompiledEdits(
        low=spread(low),
        high=spread(torch.where(exists, high, 0)),
        covers_special=spread(coverage & COVERS_SPECIAL != 0),
        sink_norm=unless(sink_norm == torch.inf, sink_norm),
        gate=EncoderGate(
            gain=spread(params[..., P_GAIN]),
            bias=spread(params[..., P_BIAS]),
            threshold=spread(params[..., P_THRESHOLD]),
            gate_bias=unless(gate_bias == torch.inf, gate_bias),
            zero=value.new_zeros(()),
        ),
        change=Change(
            factor=spread(
                torch.where(op == OP_ADD, 0.0, torch.where(op == OP_SCALE, value - 1, -1.0))
            ),
            offset=spread(torch.where(op == OP_SCALE, 0.0, value)),
            least=unless(~(is_floor | is_cap), least),
            most=unless(~(is_floor | is_cap), most),
        ),
        decoder_scale=unless(scale == 1, scale),
        norms=InputNorms(spread(layer), spread(constant), spread(params[..., P_ENC_SUM]))
        if bool((layer | constant).any())
        else None,
        rows=_run_rows(slot_np, width, table, rows),
    )


def window(
    coverage: Tensor, start: Tensor, end: Tensor, prompt_len: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions ``[low, high)`` that an edit or a read covers, special tokens and sinks apart.

    A token's phase is its position against the prompt's length, so phases and window are one
    interval.
    """
    low = torch.where(coverage & COVERS_PROMPT != 0, start, torch.maximum(start, prompt_len))
    high = torch.where(coverage & COVERS_GENERATION != 0, end, torch.minimum(end, prompt_len))
    return low, high


def cover(stream: Stream, edits: CompiledEdits) -> Coverage:
    """Match every token of ``stream`` with its edits."""
    position = stream.position[:, None]
    # For booleans, a <= b is: b wherever a.
    covered = (
        (position >= edits.low)
        & (position < edits.high)
        & (stream.special[:, None] <= edits.covers_special)
    )
    if edits.sink_norm is None:
        return Coverage(covered=covered, skipped=None)
    sink = stream.norm[:, None] > edits.sink_norm
    return Coverage(
        covered=covered & ~sink,
        skipped=covered & sink,
    )


def activations(
    stream: Stream, edits: CompiledEdits, pool: RowPool
) -> tuple[Tensor, Tensor | None]:
    """Each edit's activation on its token, from its own row alone, and the SAE's output scale.

    Returns:
        ``f`` ``[n, e]`` float32, and ``g`` the same, None where it is one for all.
    """
    z = _encoded(stream.x, edits.rows, pool)
    g = None
    if edits.norms is not None:
        norms = edits.norms
        mean = stream.x.mean(dim=1)[:, None]
        std = stream.x.std(dim=1)[:, None]
        scale = stream.norm[:, None] / stream.x.shape[1] ** 0.5
        z = torch.where(norms.layer, (z - mean * norms.enc_sum) / (std + LAYER_NORM_EPS), z)
        z = torch.where(norms.constant, z / scale, z)
        g = torch.where(norms.layer, std, torch.where(norms.constant, scale, 1.0))
    gate = edits.gate
    act = torch.addcmul(gate.bias, gate.gain, z)
    fires = act > gate.threshold
    if gate.gate_bias is not None:
        fires &= z + gate.gate_bias > 0
    return torch.where(fires, act, gate.zero), g


def difference(f: Tensor, edits: CompiledEdits, covered: Tensor) -> Tensor:
    """``f' - f`` ``[n, e]`` float32, zero where the edit does not cover the token."""
    change = edits.change
    d = torch.addcmul(change.offset, change.factor, f)
    if change.least is not None and change.most is not None:
        d = torch.clamp(d, change.least, change.most)
    return torch.where(covered, d, edits.gate.zero)


def decoded(coefficient: Tensor, edits: CompiledEdits, pool: RowPool) -> Tensor:
    """``sum_e coefficient[:, e] * s_e * W_dec[row[:, e]]``: ``[n, d_in]`` float32."""
    if edits.decoder_scale is not None:
        coefficient = coefficient * edits.decoder_scale
    rows = edits.rows
    if rows.W_dec is not None and len(rows.bounds) == len(coefficient):
        return torch.bmm(coefficient[:, None, :], rows.W_dec).squeeze(1)
    delta = coefficient.new_empty(coefficient.shape[0], pool.W_dec.shape[1])
    for start, stop, w in _runs(rows, rows.W_dec, pool.W_dec):
        torch.mm(coefficient[start:stop], w, out=delta[start:stop])
    return delta


def add_delta(hidden_states: Tensor, stream: Stream, delta: Tensor, touched: Tensor | None) -> None:
    """Add ``delta`` ``[n, d_in]`` float32 to the stream's tokens, once, with one final cast.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype.
        stream: the tokens.
        delta: what to add.
        touched: ``[n]`` bool, which of them; the others keep their bits. None means all.
    """
    token = stream.token
    if touched is not None:
        if isinstance(token, slice):
            token = torch.arange(token.start, token.stop, device=delta.device)
        token, delta = token[touched], delta[touched]
    elif isinstance(token, slice) and hidden_states.dtype == delta.dtype:
        hidden_states[token].add_(delta)
        return
    hidden_states[token] = (hidden_states[token].float() + delta).to(hidden_states.dtype)


def _run_rows(slot_np: IntArray, width: int, table: EditTable, pool: RowPool) -> RunRows:
    """Slots that name the same rows in the same order count as one, so their tokens make one run.

    Columns past a slot's edits are row 0 in the table: their coefficient is zero, since they cover
    nothing.
    """
    row_np = table.rows_np[slot_np, :width]
    starts = np.flatnonzero(np.concatenate([[True], (row_np[1:] != row_np[:-1]).any(axis=1)]))
    stops = np.append(starts[1:], len(slot_np))
    row = torch.from_numpy(row_np[starts].astype(np.int64)).to(pool.W_enc.device)
    held = row.numel() * pool.W_enc.shape[1] <= _GATHERED_ELEMENTS
    return RunRows(
        bounds=list(zip(starts.tolist(), stops.tolist(), strict=True)),
        row=row,
        W_enc=pool.W_enc[row] if held else None,
        W_dec=pool.W_dec[row] if held else None,
    )


def _encoded(x: Tensor, rows: RunRows, pool: RowPool) -> Tensor:
    """``W_enc[row[t, i]] @ x[t]``: ``[n, e]`` float32."""
    if rows.W_enc is not None and len(rows.bounds) == len(x):
        # The rows as the right factor: torch's other order is eight times slower on a CPU.
        return torch.bmm(x[:, None, :], rows.W_enc.transpose(1, 2)).squeeze(1)
    z = x.new_empty(x.shape[0], rows.row.shape[1])
    for start, stop, w in _runs(rows, rows.W_enc, pool.W_enc):
        torch.mm(x[start:stop], w.T, out=z[start:stop])
    return z


def _runs(rows: RunRows, gathered: Tensor | None, w: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """``(start, stop, rows [e, d_in])`` of every run."""
    for i, (start, stop) in enumerate(rows.bounds):
        yield start, stop, w[rows.row[i]] if gathered is None else gathered[i]
