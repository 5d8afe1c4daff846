"""The edit on a CPU in one compiled call, which allocates no tensor and writes only edited tokens.

Numba, which comes with vLLM, compiles it when the worker starts, so no compiler has to be
installed. A token's sums do not depend on what else is in the batch.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from steering.worker.ops import cpu_gates, cpu_reads
from steering.worker.ops.buffers import BoundKernel, Buffers, OnStream
from steering.worker.ops.cpu_launch import Kernels, launcher
from steering.worker.ops.cpu_parts import (
    BLOCK,
    LOAD,
    STORE,
    ZERO,
    activation,
    add,
    applied,
    carried_array,
    compiled,
    covers,
    decode,
    encode,
    moments,
    needed_coverage,
    output_scale,
    rows_array,
    square,
    stream_reader,
    token_arrays,
)
from steering.worker.ops.layout import (
    ANY_GATE,
    CARRIED,
    COVERS_SINKS,
    E_COLUMN,
    E_COVERAGE,
    E_FLAGS,
    E_GATES,
    E_OP,
    E_ROW,
    GATE_BELOW,
    GATE_BITS,
    HELD_BACK,
    KIND_SCOPE,
    KIND_SENSE,
    MAX_GATES,
    MAX_INTERVENTIONS,
    NO_SLOT,
    NORM_LAYER,
    NOT_COVERED,
    NOT_EDITED,
    OP_ADD,
    P_DECODER_SCALE,
    P_NORM,
    P_SINK,
    P_THRESHOLD,
    QUIET,
    REREAD,
    SCOPE_PROMPT,
    SCOPE_TOKEN,
    SILENT,
    SKIPPED_SINK,
)

_NOT_COVERED, _SKIPPED_SINK = np.float32(NOT_COVERED), np.float32(SKIPPED_SINK)
_HELD_BACK, _NOT_EDITED = np.float32(HELD_BACK), np.float32(NOT_EDITED)
_SILENT = np.float32(SILENT)


@compiled
def _reread(p, f, op, value, threshold):  # type: ignore[no-untyped-def]
    """``p' - p``, as `reference.reread`."""
    new = applied(f, op, value)
    if new == f:
        return ZERO
    if new > threshold:
        return new - p
    return min(p, _SILENT * threshold) - p


@compiled
def _open_gates(kind, first_held, events, position, prompt_len):  # type: ignore[no-untyped-def]
    """The gates of a slot that are open at a token, as bits."""
    bits = 0
    for i in range(MAX_GATES):
        below, scope = kind[i] & KIND_SENSE == GATE_BELOW, kind[i] // KIND_SCOPE
        if scope == SCOPE_TOKEN:
            holds = (events >> (QUIET + i if below else i)) & 1 != 0
        else:
            last = prompt_len - 1 if scope == SCOPE_PROMPT else position
            holds = (first_held[i] <= last) != below
        if holds:
            bits |= 1 << i
    return bits


@compiled
def _is_open(open_bits, gates):  # type: ignore[no-untyped-def]
    named = gates & GATE_BITS
    return open_bits & named != 0 if gates & ANY_GATE else open_bits & named == named


def _kernel(load: Any, store: Any, load_residual: Any) -> Any:
    """The loop over tokens, `reference.steer_tokens`, for one pair of dtypes.

    Args:
        load: reads a row of hidden states, from `LOAD`.
        store: writes one, from `STORE`.
        load_residual: reads a row of the residual, from `LOAD`.
    """

    read_stream = stream_reader(load, load_residual)

    @compiled
    def steer(  # type: ignore[no-untyped-def]
        hidden, hidden_stride,  # 1-D storage of [num_tokens, d_in], read and written
        residual, residual_stride,  # the same; empty if the stream is the hidden states alone
        num_tokens, d_in, token_slot, positions, input_ids, is_special,
        prompt_len, max_share, reports, count, ints, value, kind, first_held, events,
        w_enc, w_dec, params, f_out, share_out, carried, counters,
    ):  # fmt: skip
        x, other = np.empty(d_in, np.float32), np.empty(d_in, np.float32)
        delta = np.empty(d_in, np.float32)
        active = np.empty(MAX_INTERVENTIONS + BLOCK, np.int64)  # indices of the slot's edits
        held = np.empty(MAX_INTERVENTIONS, np.bool_)  # whether a condition holds each of them back
        row = np.empty(BLOCK, np.int64)
        z, factor = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        for token in range(num_tokens):
            slot = token_slot[token]
            if slot == NO_SLOT or count[slot] == 0:
                continue
            position = positions[token]
            special = position == 0 or is_special[input_ids[token]]
            needed = needed_coverage(position, prompt_len[slot], special)
            reported = reports[slot] != 0
            if reported:
                share_out[token] = _NOT_EDITED
            num_covered = num_open = 0
            open_bits = -1  # not worked out yet
            for i in range(count[slot]):
                if covers(ints[slot, i], needed, position):
                    is_open = True
                    if ints[slot, i, E_GATES] != 0:
                        if open_bits < 0:
                            open_bits = _open_gates(
                                kind[slot], first_held[slot], events[token], position,
                                prompt_len[slot],
                            )  # fmt: skip
                        is_open = _is_open(open_bits, ints[slot, i, E_GATES])
                    active[num_covered], held[num_covered] = i, not is_open
                    num_covered += 1
                    num_open += is_open
                elif reported:
                    f_out[token, ints[slot, i, E_COLUMN]] = _NOT_COVERED
            # Even if every edit is held back, a report must say whether the token is a sink.
            if num_open == 0 and not (reported and num_covered > 0):
                continue

            read_stream(hidden, token * hidden_stride, residual, token * residual_stride, x, other)
            norm = np.sqrt(square(x))
            num_active = 0
            any_layer_norm = False
            for k in range(num_covered):
                i = active[k]
                param = params[ints[slot, i, E_ROW]]
                if ints[slot, i, E_FLAGS] & CARRIED:  # judged where it was read
                    sink = carried[token, ints[slot, i, E_COLUMN]] == _SKIPPED_SINK
                else:
                    sink = norm > param[P_SINK] and not ints[slot, i, E_COVERAGE] & COVERS_SINKS
                if sink or held[k]:
                    if reported:
                        why = _SKIPPED_SINK if sink else _HELD_BACK
                        f_out[token, ints[slot, i, E_COLUMN]] = why
                    continue
                active[num_active] = i
                num_active += 1
                any_layer_norm |= param[P_NORM] == NORM_LAYER
            counters[1] += num_active < num_open
            if num_active == 0:
                continue
            counters[0] += 1

            rms = norm / np.sqrt(np.float32(d_in))
            mean = std = ZERO
            if any_layer_norm:
                mean, std = moments(x, other)

            delta[:] = ZERO
            for first in range(0, num_active, BLOCK):
                reads = False
                for k in range(BLOCK):
                    # The last block repeats its last edit, with a factor of zero.
                    i = active[min(first + k, num_active - 1)]
                    row[k] = ints[slot, i, E_ROW]
                    flags = ints[slot, i, E_FLAGS]
                    reads |= not flags & CARRIED and (
                        reported or ints[slot, i, E_OP] != OP_ADD or flags & REREAD
                    )
                if reads:
                    encode(w_enc, row, x, z)
                factor[:] = ZERO
                for k in range(min(BLOCK, num_active - first)):
                    i = active[first + k]
                    if ints[slot, i, E_FLAGS] & CARRIED:
                        factor[k] = carried[token, ints[slot, i, E_COLUMN]]
                        continue
                    param = params[row[k]]
                    p = f = ZERO
                    if reads:
                        p, f = activation(z[k], param, mean, std, rms)
                    if reported:
                        f_out[token, ints[slot, i, E_COLUMN]] = f
                    op, operand = ints[slot, i, E_OP], value[slot, i]
                    if ints[slot, i, E_FLAGS] & REREAD:
                        change = _reread(p, f, op, operand, param[P_THRESHOLD])
                    elif op == OP_ADD:  # never reads f
                        change = operand
                    else:
                        change = applied(f, op, operand) - f
                    g = output_scale(param, std, rms)
                    factor[k] = change * param[P_DECODER_SCALE] * g
                decode(w_dec, row, factor, delta)
            if reported or max_share[slot] < np.inf:
                share = np.sqrt(square(delta)) / norm if norm > ZERO else ZERO
                if share > max_share[slot]:
                    scale = max_share[slot] / share
                    for i in range(d_in):
                        delta[i] *= scale
                    share = -max_share[slot]
                if reported:
                    share_out[token] = share
            load(hidden, token * hidden_stride, other)
            add(other, delta)
            store(hidden, token * hidden_stride, delta)

    return steer


_KERNELS: Final[Kernels] = {
    (hidden, residual): _kernel(LOAD[hidden], STORE[hidden], LOAD[residual])
    for hidden in LOAD
    for residual in LOAD
}


def edits(dtype: torch.dtype) -> bool:
    """Whether the kernel can edit a stream of this dtype (not float16)."""
    return dtype in LOAD


def bound(buffers: Buffers) -> BoundKernel:
    """Bind the kernel to buffers that stay where they are, which are taken apart only once.

    To take them apart again in every pass, with cold caches, would cost as much as the edit itself.
    """
    return BoundKernel(cpu_gates.bound(buffers), cpu_reads.bound(buffers), _bound_edit(buffers))


def _bound_edit(buffers: Buffers) -> OnStream:
    slots, table, state, rows = buffers.slots, buffers.table, buffers.gate_state, buffers.rows
    arrays = (
        *token_arrays(buffers),
        slots.max_share.numpy(),
        slots.reports.numpy(),
        table.count.numpy(),
        table.ints.numpy(),
        table.value.numpy(),
        state.kind.numpy(),
        state.first_held.numpy(),
        state.events.numpy(),
        rows_array(rows.W_enc),
        rows_array(rows.W_dec),
        rows.params.numpy(),
        buffers.f.numpy(),
        buffers.share.numpy(),
        carried_array(buffers),
        buffers.counters.numpy(),
    )

    return launcher(_KERNELS, arrays)
