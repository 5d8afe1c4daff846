"""The edits that are read here and added at other hook points, on a CPU, in one compiled call."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from steering.worker.ops.buffers import Buffers, OnStream
from steering.worker.ops.cpu_launch import Kernels, launcher
from steering.worker.ops.cpu_parts import (
    BLOCK,
    LOAD,
    ZERO,
    activation,
    applied,
    carried_array,
    compiled,
    covers,
    encode,
    input_normed,
    moments,
    needed_coverage,
    output_scale,
    rows_array,
    square,
    stream_reader,
    token_arrays,
)
from steering.worker.ops.layout import (
    COVERS_SINKS,
    E_COLUMN,
    E_COVERAGE,
    E_OP,
    E_ROW,
    MAX_INTERVENTIONS,
    NO_SLOT,
    NORM_LAYER,
    OP_ADD,
    P_DECODER_SCALE,
    P_NORM,
    P_SINK,
    SKIPPED_SINK,
)

_SKIPPED_SINK = np.float32(SKIPPED_SINK)


def _kernel(load: Any, load_residual: Any) -> Any:
    """The loop over tokens, `reference.read_edits`, for one pair of dtypes.

    Args:
        load: reads a row of hidden states, from `LOAD`.
        load_residual: reads a row of the residual, from `LOAD`.
    """

    read_stream = stream_reader(load, load_residual)

    @compiled
    def read(  # type: ignore[no-untyped-def]
        hidden, hidden_stride,  # 1-D storage of [num_tokens, d_in]
        residual, residual_stride,  # the same; empty if the stream is the hidden states alone
        num_tokens, d_in, token_slot, positions, input_ids, is_special, prompt_len, reports,
        count, ints, value, w_enc, params, f_out, carried, norm_kind, norm_eps,
    ):  # fmt: skip
        x, other = np.empty(d_in, np.float32), np.empty(d_in, np.float32)
        active = np.empty(MAX_INTERVENTIONS + BLOCK, np.int64)  # indices of the slot's edits
        row, z = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.float32)
        for token in range(num_tokens):
            slot = token_slot[token]
            if slot == NO_SLOT or count[slot] == 0:
                continue
            position = positions[token]
            special = position == 0 or is_special[input_ids[token]]
            needed = needed_coverage(position, prompt_len[slot], special)
            num_covered = 0
            for i in range(count[slot]):
                if covers(ints[slot, i], needed, position):
                    active[num_covered] = i
                    num_covered += 1
            if num_covered == 0:
                continue
            read_stream(hidden, token * hidden_stride, residual, token * residual_stride, x, other)
            input_normed(x, norm_kind, norm_eps)
            norm = np.sqrt(square(x))
            num_active = 0
            any_layer_norm = False
            for k in range(num_covered):
                i = active[k]
                param = params[ints[slot, i, E_ROW]]
                if norm > param[P_SINK] and not ints[slot, i, E_COVERAGE] & COVERS_SINKS:
                    carried[token, ints[slot, i, E_COLUMN]] = _SKIPPED_SINK
                    continue
                active[num_active] = i
                num_active += 1
                any_layer_norm |= param[P_NORM] == NORM_LAYER
            rms = norm / np.sqrt(np.float32(d_in))
            mean = std = ZERO
            if any_layer_norm:
                mean, std = moments(x, other)
            reported = reports[slot] != 0
            for first in range(0, num_active, BLOCK):
                num = min(BLOCK, num_active - first)
                reads = False
                for k in range(BLOCK):
                    i = active[first + min(k, num - 1)]
                    row[k] = ints[slot, i, E_ROW]
                    reads |= reported or ints[slot, i, E_OP] != OP_ADD
                if reads:
                    encode(w_enc, row, x, z)
                for k in range(num):
                    i = active[first + k]
                    param = params[row[k]]
                    f = ZERO
                    if reads:
                        _, f = activation(z[k], param, mean, std, rms)
                    column, op, operand = (
                        ints[slot, i, E_COLUMN],
                        ints[slot, i, E_OP],
                        value[slot, i],
                    )
                    if reported:
                        f_out[token, column] = f
                    change = operand if op == OP_ADD else applied(f, op, operand) - f
                    g = output_scale(param, std, rms)
                    carried[token, column] = change * param[P_DECODER_SCALE] * g

    return read


_KERNELS: Final[Kernels] = {
    (hidden, residual): _kernel(LOAD[hidden], LOAD[residual])
    for hidden in LOAD
    for residual in LOAD
}


def bound(buffers: Buffers) -> OnStream:
    """`reference.read_edits` for buffers that stay where they are; float32 and bfloat16 streams."""
    slots, table, rows = buffers.slots, buffers.reads, buffers.rows
    arrays = (
        *token_arrays(buffers),
        slots.reports.numpy(),
        table.count.numpy(),
        table.ints.numpy(),
        table.value.numpy(),
        rows_array(rows.W_enc),
        rows.params.numpy(),
        buffers.f.numpy(),
        carried_array(buffers),
        buffers.input_norm.kind,
        np.float32(buffers.input_norm.eps),
    )
    return launcher(_KERNELS, arrays)
