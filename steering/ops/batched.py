"""The edit over a whole batch in torch: the CPU's path, and CUDA's wherever a full encode is due.

Split in three so that the full path shares all of it: which edits cover which tokens, what the
activations are, what the delta is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steering.ops.reference import _LAYER_NORM_EPS
from steering.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SINKS,
    COVERS_SPECIAL,
    OP_ADD,
    OP_CLAMP,
    OP_FLOOR,
    OP_SCALE,
)
from steering.rows import (
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
from steering.slots import E_COVERAGE, E_END, E_OP, E_ROW, E_START, EditTable

#: Gathering a row for every (token, edit) pair costs about as much as multiplying that many
#: rows in one matrix product, so the product is taken while it is at most this much larger.
_DENSE_ROWS_PER_PAIR = 16


@dataclass(frozen=True)
class Stream:
    """The stream of the tokens that something is to happen to.

    Attributes:
        token: ``[n]`` int64, index in the batch.
        slot: ``[n]`` int64, its slot.
        x: ``[n, d_in]`` float32, hidden states plus residual.
        position: ``[n]`` int64.
        special: ``[n]`` bool, a special token or the sequence's first.
        in_prompt: ``[n]`` bool, position below the original prompt's length.
        norm: ``[n]`` float32, Euclidean norm of ``x``.
    """

    token: Tensor
    slot: Tensor
    x: Tensor
    position: Tensor
    special: Tensor
    in_prompt: Tensor
    norm: Tensor

    def covers(self, coverage: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Whether each token is covered, sinks apart; operands broadcast against ``[n, 1]``."""
        position = self.position[:, None]
        phase = torch.where(self.in_prompt, COVERS_PROMPT, COVERS_GENERATION)[:, None]
        return (
            (coverage & phase != 0)
            & (~self.special[:, None] | (coverage & COVERS_SPECIAL != 0))
            & (position >= start)
            & (position < end)
        )


@dataclass(frozen=True)
class Coverage:
    """Which edits cover which tokens.

    Attributes:
        row: ``[n, e]`` int64, row in the pool of each edit.
        op: ``[n, e]`` int32.
        value: ``[n, e]`` float32.
        covered: ``[n, e]`` bool, the edit applies to the token.
        skipped: ``[n, e]`` bool, it would but for a sink.
    """

    row: Tensor
    op: Tensor
    value: Tensor
    covered: Tensor
    skipped: Tensor


def gather_stream(
    hidden_states: Tensor,
    residual: Tensor | None,
    token: Tensor,
    slot: Tensor,
    positions: Tensor,
    input_ids: Tensor,
    is_special: Tensor,
    prompt_len: Tensor,
) -> Stream:
    """The float32 stream and the facts of ``token``; shapes as in :class:`Stream`."""
    x = hidden_states[token].float()
    if residual is not None:
        x += residual[token].float()
    position = positions[token]
    return Stream(
        token=token,
        slot=slot,
        x=x,
        position=position,
        special=is_special[input_ids[token]] | (position == 0),
        in_prompt=position < prompt_len[slot],
        norm=torch.linalg.vector_norm(x, dim=1),
    )


def cover(stream: Stream, table: EditTable, rows: RowPool, width: int) -> Coverage:
    """Match every token of ``stream`` with its slot's edits, of which none has over ``width``."""
    ints = table.ints[stream.slot, :width]  # [n, e, NUM_INTS]
    row = ints[..., E_ROW].long()
    coverage = ints[..., E_COVERAGE]
    exists = torch.arange(width, device=row.device) < table.count[stream.slot][:, None]
    covered = exists & stream.covers(coverage, ints[..., E_START], ints[..., E_END])
    sink = (stream.norm[:, None] > rows.params[:, P_SINK][row]) & (coverage & COVERS_SINKS == 0)
    return Coverage(
        row=row,
        op=ints[..., E_OP],
        value=table.value[stream.slot, :width],
        covered=covered & ~sink,
        skipped=covered & sink,
    )


def activations(
    stream: Stream, row: Tensor, rows: RowPool, distinct: Tensor
) -> tuple[Tensor, Tensor]:
    """Each edit's activation on its token, from its own row alone, and the SAE's output scale.

    Args:
        stream: the tokens.
        row: ``[n, e]`` rows of the edits.
        rows: the pool.
        distinct: ``[r]`` the distinct rows in ``row``.

    Returns:
        ``f`` and ``g``, both ``[n, e]`` float32.
    """
    z = _dot(stream.x, row, rows.W_enc, distinct)
    params = rows.params[row]  # [n, e, NUM_PARAMS]
    g = torch.ones_like(z)
    norm = params[..., P_NORM]
    if bool((norm != 0).any()):
        mean = stream.x.mean(dim=1)[:, None]
        std = stream.x.std(dim=1)[:, None]
        scale = stream.norm[:, None] / stream.x.shape[1] ** 0.5
        layer, constant = norm == NORM_LAYER, norm == NORM_CONSTANT
        z = torch.where(layer, (z - mean * params[..., P_ENC_SUM]) / (std + _LAYER_NORM_EPS), z)
        z = torch.where(constant, z / scale, z)
        g = torch.where(layer, std, torch.where(constant, scale, g))
    act = params[..., P_GAIN] * z + params[..., P_BIAS]
    fires = (act > params[..., P_THRESHOLD]) & (z + params[..., P_GATE_BIAS] > 0)
    return torch.where(fires, act, 0.0), g


def change(f: Tensor, op: Tensor, value: Tensor) -> Tensor:
    """``f' - f`` ``[n, e]`` of each edit. ``add`` never reads ``f``."""
    return torch.where(
        op == OP_CLAMP,
        value - f,
        torch.where(
            op == OP_ADD,
            value,
            torch.where(
                op == OP_SCALE,
                value * f - f,
                torch.where(op == OP_FLOOR, torch.maximum(f, value), torch.minimum(f, value)) - f,
            ),
        ),
    )


def decoded(coefficient: Tensor, row: Tensor, rows: RowPool, distinct: Tensor) -> Tensor:
    """``sum_e coefficient[:, e] * s_e * W_dec[row[:, e]]``: ``[n, d_in]`` float32."""
    coefficient = coefficient * rows.params[:, P_DECODER_SCALE][row]
    if dense_pays(distinct.shape[0], row.shape[1]):
        local = _local_index(distinct, rows.capacity)
        spread = coefficient.new_zeros(row.shape[0], distinct.shape[0])
        spread.scatter_add_(1, local[row], coefficient)
        return spread @ rows.W_dec[distinct]
    return torch.bmm(coefficient[:, None, :], rows.W_dec[row]).squeeze(1)


def add_delta(hidden_states: Tensor, token: Tensor, delta: Tensor) -> None:
    """Add ``delta`` ``[n, d_in]`` float32 to the rows ``token``, once, with one final cast."""
    hidden_states[token] = (hidden_states[token].float() + delta).to(hidden_states.dtype)


def _dot(x: Tensor, row: Tensor, w: Tensor, distinct: Tensor) -> Tensor:
    if dense_pays(distinct.shape[0], row.shape[1]):
        local = _local_index(distinct, w.shape[0])
        return (x @ w[distinct].T).gather(1, local[row])
    return torch.bmm(w[row], x[:, :, None]).squeeze(2)


def dense_pays(num_rows: int, width: int) -> bool:
    """Whether one product with all ``num_rows`` beats gathering ``width`` rows for each token."""
    return num_rows <= _DENSE_ROWS_PER_PAIR * width


def _local_index(distinct: Tensor, capacity: int) -> Tensor:
    local = torch.zeros(capacity, dtype=torch.int64, device=distinct.device)
    local[distinct] = torch.arange(distinct.shape[0], device=distinct.device)
    return local
