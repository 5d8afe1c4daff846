"""The conditions that are read at one hook point, before its edits, in one Triton launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from steering.worker.ops import layout
from steering.worker.ops.buffers import Buffers
from steering.worker.ops.triton_parts import (
    FIRST_GATE_COLUMN,
    GATE_INTS,
    MAX_ENTRIES,
    MAX_GATES,
    NUM_PARAMS,
    SINK,
    input_normed,
    launch,
    layout_for,
    moments_if_asked,
    norms,
    read_latents,
    with_residual,
)

_ROW, _INDEX, _SCOPE = (
    tl.constexpr(layout.G_ROW),
    tl.constexpr(layout.G_INDEX),
    tl.constexpr(layout.G_SCOPE),
)
_QUIET = tl.constexpr(layout.QUIET)
_TOKEN, _PROMPT = tl.constexpr(layout.SCOPE_TOKEN), tl.constexpr(layout.SCOPE_PROMPT)
_STOP = tl.constexpr(layout.SCOPE_STOP)


def read_gates(hidden_states: Tensor, residual: Tensor | None, buffers: Buffers) -> None:
    """`reference.read_gates` as one kernel launch."""
    gates, state, rows = buffers.gates, buffers.gate_state, buffers.rows
    launch(
        gate_kernel,
        hidden_states,
        residual,
        buffers,
        pointers=(
            gates.count,
            gates.ints,
            gates.threshold,
            state.events,
            state.first_held,
            rows.W_enc,
            rows.params,
            buffers.f,
        ),
        numbers=(buffers.input_norm.eps,),
        shape=layout_for(hidden_states.shape[1], hidden_states.element_size()),
        INPUT_NORM=buffers.input_norm.kind,
    )


@triton.jit
def gate_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [num_tokens, D_IN] model dtype
    residual_ptr,  # the same shape, or None
    token_slot_ptr,  # [num_tokens] int32
    positions_ptr,  # [num_tokens] int64
    input_ids_ptr,  # [num_tokens] int32
    is_special_ptr,  # [vocab_size] bool
    prompt_len_ptr,  # [num_slots] int32
    count_ptr,  # [num_slots] int32
    ints_ptr,  # [num_slots, MAX_GATES, GATE_INTS] int32
    threshold_ptr,  # [num_slots, MAX_GATES] float32
    events_ptr,  # [num_tokens] int32, read and written
    first_held_ptr,  # [num_slots, MAX_GATES] int32, read and written
    w_enc_ptr,  # [capacity, ROW_STRIDE] float32
    params_ptr,  # [capacity, NUM_PARAMS] float32
    f_ptr,  # [num_tokens, MAX_ENTRIES] float32, written
    hidden_stride,
    residual_stride,
    input_eps,
    INPUT_NORM: tl.constexpr,
    D_IN: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program for each token t that is neither special, nor the first, nor a sink to gate i::

    f_i               as in `steer_kernel`
    event_i           = f_i > threshold_i, and t in the prompt, or after it, if the scope says so
    events[t]        |= event_i << i | (f_i <= threshold_i) << (i + QUIET)
    first_held[s, i]  = min(first_held[s, i], position[t])  if event_i and the scope is not token
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slot_ptr + token)
    if slot < 0:
        return
    count = tl.load(count_ptr + slot)
    if count == 0:
        return
    position = tl.load(positions_ptr + token)
    if position == 0:
        return
    if tl.load(is_special_ptr + tl.load(input_ids_ptr + token)) != 0:
        return
    generated = position >= tl.load(prompt_len_ptr + slot)

    d = tl.arange(0, BLOCK_D)
    inside = d < D_IN
    hidden = tl.load(hidden_ptr + token * hidden_stride + d, mask=inside, other=0.0)
    x = with_residual(hidden, residual_ptr, token * residual_stride + d, inside)
    x = input_normed(x, inside, input_eps, INPUT_NORM, D_IN)
    norm, rms = norms(x, D_IN)

    every = tl.arange(0, MAX_GATES)
    exists = every < count
    ints = ints_ptr + slot * MAX_GATES * GATE_INTS
    row = tl.load(ints + every * GATE_INTS + _ROW, mask=exists, other=0).to(tl.int64)
    mean, std = moments_if_asked(x, inside, params_ptr + row * NUM_PARAMS, exists, D_IN)

    bits = 0
    for first in range(0, count, BLOCK_E):
        bits |= _block_bits(
            x, norm, mean, std, rms, first + tl.arange(0, BLOCK_E), count, position, generated,
            ints, threshold_ptr + slot * MAX_GATES, first_held_ptr + slot * MAX_GATES,
            w_enc_ptr, params_ptr, f_ptr + token * MAX_ENTRIES, d, inside, ROW_STRIDE,
        )  # fmt: skip
    tl.store(events_ptr + token, tl.load(events_ptr + token) | bits)


@triton.jit
def _block_bits(  # type: ignore[no-untyped-def]
    x, norm, mean, std, rms, e, count, position, generated,
    ints_ptr, threshold_ptr, first_held_ptr, w_enc_ptr, params_ptr, f_at, d, inside,
    ROW_STRIDE: tl.constexpr,
):  # fmt: skip
    """The bits of the conditions ``e`` of a slot; they share one wait for their rows."""
    exists = e < count
    entry = ints_ptr + e * GATE_INTS
    row = tl.load(entry + _ROW, mask=exists, other=0).to(tl.int64)
    index = tl.load(entry + _INDEX, mask=exists, other=0)
    scope = tl.load(entry + _SCOPE, mask=exists, other=0)
    threshold = tl.load(threshold_ptr + e, mask=exists, other=0.0)
    params = params_ptr + row * NUM_PARAMS
    eligible = exists & ~(norm > tl.load(params + SINK))
    tile = row[:, None] * ROW_STRIDE + d[None, :]
    w_enc = tl.load(w_enc_ptr + tile, mask=eligible[:, None] & inside[None, :], other=0.0)
    _, f, _, _ = read_latents(tl.sum(w_enc * x[None, :], axis=1), params, mean, std, rms)
    tl.store(f_at + FIRST_GATE_COLUMN + index, f, mask=eligible)
    elsewhere = ((scope == _STOP) & ~generated) | ((scope == _PROMPT) & generated)
    event = eligible & (f > threshold) & ~elsewhere
    quiet = eligible & (f <= threshold)
    # Triton's interpreter accepts only the result of a comparison as an atomic's mask.
    kept = tl.where(event & (scope != _TOKEN), 1, 0) != 0
    tl.atomic_min(first_held_ptr + index, position.to(tl.int32), mask=kept, sem="relaxed")
    return tl.sum((event.to(tl.int32) << index) | (quiet.to(tl.int32) << (index + _QUIET)))
