"""The edits that are read here and added at other hook points, in one Triton launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from steering.worker.ops import layout
from steering.worker.ops.buffers import Buffers
from steering.worker.ops.triton_parts import (
    DECODER_SCALE,
    EDIT_INTS,
    MAX_EDITS,
    MAX_ENTRIES,
    NUM_PARAMS,
    SINK,
    SINKS,
    Launch,
    applied,
    coverage_at,
    input_normed,
    launch,
    layout_for,
    moments_if_asked,
    norms,
    read_latents,
    with_residual,
)

_ADD = tl.constexpr(layout.OP_ADD)
_ROW, _OP = tl.constexpr(layout.E_ROW), tl.constexpr(layout.E_OP)
_COLUMN = tl.constexpr(layout.E_COLUMN)
_SKIPPED_SINK = tl.constexpr(layout.SKIPPED_SINK)


def reads_layout_for(d_in: int, itemsize: int) -> Launch:
    """`layout_for`, except where ptxas would spill to fit two programs on a multiprocessor."""
    shape = layout_for(d_in, itemsize)
    if shape.block_d == 8192 and itemsize == 2:
        return Launch(shape.block_d, block_e=4, num_warps=32)
    return shape


def read_edits(hidden_states: Tensor, residual: Tensor | None, buffers: Buffers) -> None:
    """`reference.read_edits` as one kernel launch."""
    assert buffers.carried is not None
    assert buffers.f.is_contiguous() and buffers.carried.is_contiguous()
    table, rows = buffers.reads, buffers.rows
    launch(
        read_kernel,
        hidden_states,
        residual,
        buffers,
        pointers=(
            buffers.slots.reports,
            table.count,
            table.ints,
            table.value,
            rows.W_enc,
            rows.params,
            buffers.f,
            buffers.carried,
        ),
        numbers=(buffers.input_norm.eps,),
        shape=reads_layout_for(hidden_states.shape[1], hidden_states.element_size()),
        INPUT_NORM=buffers.input_norm.kind,
    )


@triton.jit
def read_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [num_tokens, D_IN] model dtype
    residual_ptr,  # the same shape, or None
    token_slot_ptr,  # [num_tokens] int32
    positions_ptr,  # [num_tokens] int64
    input_ids_ptr,  # [num_tokens] int32
    is_special_ptr,  # [vocab_size] bool
    prompt_len_ptr,  # [num_slots] int32
    reports_ptr,  # [num_slots] int32
    count_ptr,  # [num_slots] int32
    ints_ptr,  # [num_slots, MAX_EDITS, EDIT_INTS] int32
    value_ptr,  # [num_slots, MAX_EDITS] float32
    w_enc_ptr,  # [capacity, ROW_STRIDE] float32
    params_ptr,  # [capacity, NUM_PARAMS] float32
    f_ptr,  # [num_tokens, MAX_ENTRIES] float32, written
    carried_ptr,  # [num_tokens, MAX_EDITS] float32, written
    hidden_stride,
    residual_stride,
    input_eps,
    INPUT_NORM: tl.constexpr,
    D_IN: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program for each token t; for the edits i of its slot that cover t::

    f_i            as in `steer_kernel`, read from the stream here
    carried[t, i]  = (op_i(f_i) - f_i) * s_i * g_i, or SKIPPED_SINK
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slot_ptr + token)
    if slot < 0:
        return
    count = tl.load(count_ptr + slot)
    if count == 0:
        return
    position = tl.load(positions_ptr + token)
    special = (tl.load(is_special_ptr + tl.load(input_ids_ptr + token)) != 0) | (position == 0)
    # How many edits are recorded: all or none.
    reported = tl.where(tl.load(reports_ptr + slot) != 0, count, 0)

    every = tl.arange(0, MAX_EDITS)
    exists = every < count
    ints = ints_ptr + (slot * MAX_EDITS + every) * EDIT_INTS
    prompt_len = tl.load(prompt_len_ptr + slot)
    coverage, covered = coverage_at(ints, exists, position, special, prompt_len)
    if tl.max(covered.to(tl.int32)) == 0:
        return

    d = tl.arange(0, BLOCK_D)
    inside = d < D_IN
    hidden = tl.load(hidden_ptr + token * hidden_stride + d, mask=inside, other=0.0)
    x = with_residual(hidden, residual_ptr, token * residual_stride + d, inside)
    x = input_normed(x, inside, input_eps, INPUT_NORM, D_IN)
    norm, rms = norms(x, D_IN)

    params = params_ptr + tl.load(ints + _ROW, mask=covered, other=0).to(tl.int64) * NUM_PARAMS
    sink = (norm > tl.load(params + SINK, mask=covered, other=0.0)) & (coverage & SINKS == 0)
    carried_at = carried_ptr + token * MAX_EDITS
    column = tl.load(ints + _COLUMN, mask=covered, other=0)
    tl.store(carried_at + column, _SKIPPED_SINK, mask=covered & sink)
    active = covered & ~sink
    active_bits = tl.sum(tl.where(active, tl.full([MAX_EDITS], 1, tl.int64) << every, 0))
    if active_bits == 0:
        return
    mean, std = moments_if_asked(x, inside, params, active, D_IN)
    for first in range(0, count, BLOCK_E):
        _read_block(
            x, mean, std, rms, first + tl.arange(0, BLOCK_E), active_bits, reported,
            ints_ptr + slot * MAX_EDITS * EDIT_INTS, value_ptr + slot * MAX_EDITS,
            w_enc_ptr, params_ptr, f_ptr + token * MAX_ENTRIES, carried_at, d, inside, ROW_STRIDE,
        )  # fmt: skip


@triton.jit
def _read_block(  # type: ignore[no-untyped-def]
    x, mean, std, rms, e, active_bits, reported,
    ints_ptr, value_ptr, w_enc_ptr, params_ptr, f_at, carried_at, d, inside,
    ROW_STRIDE: tl.constexpr,
):  # fmt: skip
    """Read the edits ``e`` of a slot; they share one wait for their rows."""
    active = (active_bits >> e) & 1 != 0
    entry = ints_ptr + e * EDIT_INTS
    row = tl.load(entry + _ROW, mask=active, other=0).to(tl.int64)
    op = tl.load(entry + _OP, mask=active, other=0)
    reads = active & ((op != _ADD) | (e < reported))
    tile = row[:, None] * ROW_STRIDE + d[None, :]
    w_enc = tl.load(w_enc_ptr + tile, mask=reads[:, None] & inside[None, :], other=0.0)
    params = params_ptr + row * NUM_PARAMS
    _, f, _, g = read_latents(tl.sum(w_enc * x[None, :], axis=1), params, mean, std, rms)
    column = tl.load(entry + _COLUMN, mask=active, other=0)
    tl.store(f_at + column, f, mask=active & (e < reported))
    value = tl.load(value_ptr + e, mask=active, other=0.0)
    change = tl.where(op == _ADD, value, applied(f, op, value) - f)  # add never reads f
    change *= tl.load(params + DECODER_SCALE) * g
    tl.store(carried_at + column, change, mask=active)
