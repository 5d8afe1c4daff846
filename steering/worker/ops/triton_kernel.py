"""The edit in one Triton launch: no allocation, no synchronization, safe in a CUDA graph.

``steering/worker/ops/README.md`` says why it is built this way and what it costs.
"""

from __future__ import annotations

import math
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from steering.worker.ops import layout
from steering.worker.ops.buffers import BoundKernel, Buffers
from steering.worker.ops.triton_gates import read_gates
from steering.worker.ops.triton_parts import (
    DECODER_SCALE,
    EDIT_INTS,
    MAX_EDITS,
    MAX_ENTRIES,
    MAX_GATES,
    NUM_PARAMS,
    SINK,
    SINKS,
    applied,
    coverage_at,
    launch,
    layout_for,
    moments_if_asked,
    norms,
    read_latents,
    with_residual,
)
from steering.worker.ops.triton_reads import read_edits

_ADD = tl.constexpr(layout.OP_ADD)
_ROW, _OP = tl.constexpr(layout.E_ROW), tl.constexpr(layout.E_OP)
_COLUMN, _GATES = tl.constexpr(layout.E_COLUMN), tl.constexpr(layout.E_GATES)
_FLAGS, _REREAD = tl.constexpr(layout.E_FLAGS), tl.constexpr(layout.REREAD)
_CARRIED = tl.constexpr(layout.CARRIED)
_ANY_GATE, _GATE_BITS = tl.constexpr(layout.ANY_GATE), tl.constexpr(layout.GATE_BITS)
_QUIET, _KIND_SENSE = tl.constexpr(layout.QUIET), tl.constexpr(layout.KIND_SENSE)
_KIND_SCOPE, _BELOW = tl.constexpr(layout.KIND_SCOPE), tl.constexpr(layout.GATE_BELOW)
_SCOPE_TOKEN = tl.constexpr(layout.SCOPE_TOKEN)
_SCOPE_PROMPT = tl.constexpr(layout.SCOPE_PROMPT)
_NOT_COVERED = tl.constexpr(layout.NOT_COVERED)
_SKIPPED_SINK, _HELD_BACK = tl.constexpr(layout.SKIPPED_SINK), tl.constexpr(layout.HELD_BACK)
_NOT_EDITED, _SILENT = tl.constexpr(layout.NOT_EDITED), tl.constexpr(layout.SILENT)
_UNLIMITED = tl.constexpr(float("inf"))


def steer_tokens(hidden_states: Tensor, residual: Tensor | None, buffers: Buffers) -> None:
    """`reference.steer_tokens` as one kernel launch.

    All addresses that it reads are fixed except those of ``hidden_states`` and ``residual``, so a
    captured launch follows whatever the next step writes into ``token_slot`` and the tables.
    """
    assert buffers.f.is_contiguous()
    slots, table, state, rows = buffers.slots, buffers.table, buffers.gate_state, buffers.rows
    launch(
        steer_kernel,
        hidden_states,
        residual,
        buffers,
        pointers=(
            slots.max_share,
            slots.reports,
            table.count,
            table.ints,
            table.value,
            state.kind,
            state.first_held,
            state.events,
            rows.W_enc,
            rows.W_dec,
            rows.params,
            buffers.f,
            buffers.share,
            buffers.carried,
            buffers.counters,
        ),
        numbers=(buffers.share.stride(0),),
        shape=layout_for(hidden_states.shape[1], hidden_states.element_size()),
        LIMIT=None if buffers.limit == math.inf else buffers.limit,
    )


def bound(buffers: Buffers) -> BoundKernel:
    """Bind the kernels to buffers that stay where they are."""
    return BoundKernel(
        partial(read_gates, buffers=buffers),
        partial(read_edits, buffers=buffers),
        partial(steer_tokens, buffers=buffers),
    )


@triton.jit
def steer_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [num_tokens, D_IN] model dtype, read and written
    residual_ptr,  # the same shape, or None
    token_slot_ptr,  # [num_tokens] int32
    positions_ptr,  # [num_tokens] int64
    input_ids_ptr,  # [num_tokens] int32
    is_special_ptr,  # [vocab_size] bool
    prompt_len_ptr,  # [num_slots] int32
    max_share_ptr,  # [num_slots] float32
    reports_ptr,  # [num_slots] int32
    count_ptr,  # [num_slots] int32
    ints_ptr,  # [num_slots, MAX_EDITS, EDIT_INTS] int32
    value_ptr,  # [num_slots, MAX_EDITS] float32
    kind_ptr,  # [num_slots, MAX_GATES] int32
    first_held_ptr,  # [num_slots, MAX_GATES] int32
    events_ptr,  # [num_tokens] int32
    w_enc_ptr,  # [capacity, ROW_STRIDE] float32
    w_dec_ptr,  # [capacity, ROW_STRIDE] float32
    params_ptr,  # [capacity, NUM_PARAMS] float32
    f_ptr,  # [num_tokens, MAX_ENTRIES] float32, written
    share_ptr,  # [num_tokens] float32, written
    carried_ptr,  # [num_tokens, MAX_EDITS] float32; None if all edits are read here
    counters_ptr,  # [2] int64, added to
    hidden_stride,
    residual_stride,
    share_stride,
    D_IN: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LIMIT: tl.constexpr,  # None: the stream's dtype needs none
):
    """One program for each token t, with E the edits of its slot that cover t, whose conditions
    hold and to which t is no sink::

        x         = float32(hidden[t]) + float32(residual[t])
        z_i       = W_enc[i] @ x
        p_i       = gain_i * z_i + bias_i
        f_i       = p_i if p_i > threshold_i and z_i + gate_bias_i > 0 else 0
        change_i  = op_i(f_i) - f_i, or p'_i - p_i of a solved row
        delta     = sum_{i in E} change_i * s_i * g_i * W_dec[i]
        delta     = bounded(delta), if there is a LIMIT
        delta    *= min(1, max_share * |x| / |delta|)
        hidden[t] = dtype(float32(hidden[t]) + delta)

    For an edit that was read at another hook point, ``change_i * s_i * g_i`` and whether t is a
    sink are what that hook point left.

    Without a norm, ``g = 1``. With layer norm: ``z_i = (W_enc[i] @ x - mean(x) * sum(W_enc[i])) /
    (std(x) + eps)``, ``g = std(x)``. With a constant norm: ``z_i = W_enc[i] @ x / g``, ``g = |x| /
    sqrt(D_IN)``.
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
    prompt_len = tl.load(prompt_len_ptr + slot)
    reports = tl.load(reports_ptr + slot) != 0
    reported = tl.where(reports, count, 0)  # how many edits are recorded: all or none
    share_at = share_ptr + token * share_stride
    if reports:
        tl.store(share_at, _NOT_EDITED)

    # All of the slot's edits are matched at once: if none covers the token, no stream is read.
    every = tl.arange(0, MAX_EDITS)
    exists = every < count
    ints = ints_ptr + (slot * MAX_EDITS + every) * EDIT_INTS
    f_at = f_ptr + token * MAX_ENTRIES
    coverage, covered = coverage_at(ints, exists, position, special, prompt_len)
    report_at = f_at + tl.load(ints + _COLUMN, mask=every < reported, other=0)
    tl.store(report_at, _NOT_COVERED, mask=~covered & (every < reported))
    if tl.max(covered.to(tl.int32)) == 0:
        return
    gates = tl.load(ints + _GATES, mask=covered, other=0)
    is_open = covered
    if tl.max(gates) != 0:
        bits = _open_gates(
            kind_ptr + slot * MAX_GATES, first_held_ptr + slot * MAX_GATES,
            tl.load(events_ptr + token), position, prompt_len,
        )  # fmt: skip
        named = bits & gates & _GATE_BITS
        any_is_enough = gates & _ANY_GATE != 0
        is_open &= tl.where(any_is_enough, named != 0, named == (gates & _GATE_BITS))
        # Even if every edit is held back, a report must say whether the token is a sink.
        if (tl.max(is_open.to(tl.int32)) == 0) & (reported == 0):
            return

    d = tl.arange(0, BLOCK_D)
    inside = d < D_IN
    hidden_at = hidden_ptr + token * hidden_stride + d
    hidden = tl.load(hidden_at, mask=inside, other=0.0)
    residual_at = token * residual_stride + d
    x = with_residual(hidden, residual_ptr, residual_at, inside)
    norm, rms = norms(x, D_IN)

    params = params_ptr + tl.load(ints + _ROW, mask=covered, other=0).to(tl.int64) * NUM_PARAMS
    sink = (norm > tl.load(params + SINK, mask=covered, other=0.0)) & (coverage & SINKS == 0)
    carried_at = None
    if carried_ptr is not None:
        carried_at = carried_ptr + token * MAX_EDITS
        elsewhere = covered & (tl.load(ints + _FLAGS, mask=covered, other=0) & _CARRIED != 0)
        left_at = carried_at + tl.load(ints + _COLUMN, mask=elsewhere, other=0)
        left = tl.load(left_at, mask=elsewhere, other=0.0)
        sink = tl.where(elsewhere, left == _SKIPPED_SINK, sink)
    active = is_open & ~sink
    why = tl.where(sink, _SKIPPED_SINK, _HELD_BACK)
    tl.store(report_at, why, mask=covered & ~active & (every < reported))
    skipped = tl.max((is_open & sink).to(tl.int32)) != 0
    tl.atomic_add(counters_ptr + 1, 1, mask=skipped, sem="relaxed")
    # One bit for each edit, from which the loop below takes its few instead of matching again.
    active_bits = tl.sum(tl.where(active, tl.full([MAX_EDITS], 1, tl.int64) << every, 0))
    if active_bits == 0:
        return
    tl.atomic_add(counters_ptr, 1, sem="relaxed")

    mean, std = moments_if_asked(x, inside, params, active, D_IN)

    delta = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, count, BLOCK_E):
        delta += _block_delta(
            x, mean, std, rms, first + tl.arange(0, BLOCK_E), active_bits, reported,
            ints_ptr + slot * MAX_EDITS * EDIT_INTS, value_ptr + slot * MAX_EDITS,
            w_enc_ptr, w_dec_ptr, params_ptr, f_at, carried_at, d, inside, ROW_STRIDE,
        )  # fmt: skip
    # Without a residual, x is the hidden state; holding both would spill.
    before = x if residual_ptr is None else hidden.to(tl.float32)
    if LIMIT is not None:
        if residual_ptr is not None:
            # Loaded again, since to hold it all the while would take registers.
            again = with_residual(hidden, residual_ptr, residual_at, inside)
            delta = _bounded(delta, again, LIMIT)
        delta = _bounded(delta, before, LIMIT)
    most = tl.load(max_share_ptr + slot)
    if reports | (most < _UNLIMITED):
        share = tl.where(norm > 0, tl.sqrt_rn(tl.sum(delta * delta)) / norm, 0.0)
        over = share > most
        delta *= tl.where(over, most / share, 1.0)
        if reports:
            tl.store(share_at, tl.where(over, -most, share))
    tl.store(hidden_at, (before + delta).to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bounded(delta, before, limit):  # type: ignore[no-untyped-def]
    """``delta``, cut so that no element grows beyond ``limit``, nor a larger one beyond itself."""
    after, bound = before + delta, tl.maximum(tl.abs(before), limit)
    bounded = tl.minimum(tl.maximum(after, -bound), bound) - before
    return tl.where(tl.abs(after) > bound, bounded, delta)


@triton.jit
def _open_gates(kind_ptr, first_held_ptr, events, position, prompt_len):  # type: ignore[no-untyped-def]
    """The gates of a slot that are open at a token, as bits."""
    gate = tl.arange(0, MAX_GATES)
    kind = tl.load(kind_ptr + gate)
    below = kind & _KIND_SENSE == _BELOW
    scope = kind // _KIND_SCOPE
    at_token = (events >> (gate + tl.where(below, _QUIET, 0))) & 1 != 0
    last = tl.where(scope == _SCOPE_PROMPT, prompt_len - 1, position)
    so_far = (tl.load(first_held_ptr + gate) <= last) != below
    is_open = tl.where(scope == _SCOPE_TOKEN, at_token, so_far)
    return tl.sum(is_open.to(tl.int32) << gate)


@triton.jit
def _block_delta(  # type: ignore[no-untyped-def]
    x, mean, std, rms, e, active_bits, reported,
    ints_ptr, value_ptr, w_enc_ptr, w_dec_ptr, params_ptr, f_at, carried_at, d, inside,
    ROW_STRIDE: tl.constexpr,
):  # fmt: skip
    """What the edits ``e`` of a slot add to the stream; they share one wait for their rows."""
    active = (active_bits >> e) & 1 != 0
    entry = ints_ptr + e * EDIT_INTS
    row = tl.load(entry + _ROW, mask=active, other=0).to(tl.int64)
    op = tl.load(entry + _OP, mask=active, other=0)
    flags = tl.load(entry + _FLAGS, mask=active, other=0)
    solved = flags & _REREAD != 0
    here = active
    if carried_at is not None:
        here &= flags & _CARRIED == 0

    # Both rows are asked for before either is used. A masked row costs no traffic.
    tile = row[:, None] * ROW_STRIDE + d[None, :]
    reads = here & ((op != _ADD) | (e < reported) | solved)
    w_enc = tl.load(w_enc_ptr + tile, mask=reads[:, None] & inside[None, :], other=0.0)
    w_dec = tl.load(w_dec_ptr + tile, mask=active[:, None] & inside[None, :], other=0.0)

    params = params_ptr + row * NUM_PARAMS
    z = tl.sum(w_enc * x[None, :], axis=1)
    p, f, threshold, g = read_latents(z, params, mean, std, rms)
    in_report = here & (e < reported)
    tl.store(f_at + tl.load(entry + _COLUMN, mask=in_report, other=0), f, mask=in_report)
    value = tl.load(value_ptr + e, mask=active, other=0.0)
    new = applied(f, op, value)
    wanted = tl.where(new > threshold, new, tl.minimum(p, _SILENT * threshold))
    change = tl.where(op == _ADD, value, new - f)  # add never reads f
    change = tl.where(solved, tl.where(new == f, 0.0, wanted - p), change)
    change *= tl.load(params + DECODER_SCALE) * g
    if carried_at is not None:
        elsewhere = active & (flags & _CARRIED != 0)
        left_at = carried_at + tl.load(entry + _COLUMN, mask=elsewhere, other=0)
        change = tl.where(elsewhere, tl.load(left_at, mask=elsewhere, other=0.0), change)
    # For an edit that is not active the change may be anything, and inf times the zeros of its row
    # would be NaN.
    return tl.sum(tl.where(active, change, 0.0)[:, None] * w_dec, axis=0)
