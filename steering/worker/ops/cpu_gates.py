"""The conditions that are read at one hook point, on a CPU, in one compiled call."""

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
    compiled,
    encode,
    input_normed,
    moments,
    rows_array,
    square,
    stream_reader,
    token_arrays,
)
from steering.worker.ops.layout import (
    FIRST_GATE_COLUMN,
    G_INDEX,
    G_ROW,
    G_SCOPE,
    NO_SLOT,
    NORM_LAYER,
    P_NORM,
    P_SINK,
    QUIET,
    SCOPE_PROMPT,
    SCOPE_STOP,
    SCOPE_TOKEN,
)


def _kernel(load: Any, load_residual: Any) -> Any:
    """The loop over tokens, `reference.read_gates`, for one pair of dtypes.

    Args:
        load: reads a row of hidden states, from `LOAD`.
        load_residual: reads a row of the residual, from `LOAD`.
    """

    read_stream = stream_reader(load, load_residual)

    @compiled
    def read(  # type: ignore[no-untyped-def]
        hidden, hidden_stride,  # 1-D storage of [num_tokens, d_in]
        residual, residual_stride,  # the same; empty if the stream is the hidden states alone
        num_tokens, d_in, token_slot, positions, input_ids, is_special, prompt_len,
        count, ints, threshold, events, first_held, w_enc, params, f_out, norm_kind, norm_eps,
    ):  # fmt: skip
        x, other = np.empty(d_in, np.float32), np.empty(d_in, np.float32)
        row, z = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.float32)
        for token in range(num_tokens):
            slot = token_slot[token]
            if slot == NO_SLOT or count[slot] == 0:
                continue
            position = positions[token]
            if position == 0 or is_special[input_ids[token]]:
                continue
            in_prompt = position < prompt_len[slot]
            read_stream(hidden, token * hidden_stride, residual, token * residual_stride, x, other)
            input_normed(x, norm_kind, norm_eps)
            norm = np.sqrt(square(x))
            rms = norm / np.sqrt(np.float32(d_in))
            mean, std = ZERO, ZERO
            for i in range(count[slot]):
                if params[ints[slot, i, G_ROW], P_NORM] == NORM_LAYER:
                    mean, std = moments(x, other)
                    break
            bits = 0
            for first in range(0, count[slot], BLOCK):
                num = min(BLOCK, count[slot] - first)
                for k in range(BLOCK):
                    row[k] = ints[slot, first + min(k, num - 1), G_ROW]
                encode(w_enc, row, x, z)
                for k in range(num):
                    i = first + k
                    param = params[row[k]]
                    if norm > param[P_SINK]:
                        continue
                    index, scope = ints[slot, i, G_INDEX], ints[slot, i, G_SCOPE]
                    _, f = activation(z[k], param, mean, std, rms)
                    f_out[token, FIRST_GATE_COLUMN + index] = f
                    if f <= threshold[slot, i]:
                        bits |= 1 << (QUIET + index)
                    if not f > threshold[slot, i]:
                        continue
                    if (scope == SCOPE_STOP and in_prompt) or (
                        scope == SCOPE_PROMPT and not in_prompt
                    ):
                        continue
                    bits |= 1 << index
                    if scope != SCOPE_TOKEN and position < first_held[slot, index]:
                        first_held[slot, index] = position
            events[token] |= bits

    return read


_KERNELS: Final[Kernels] = {
    (hidden, residual): _kernel(LOAD[hidden], LOAD[residual])
    for hidden in LOAD
    for residual in LOAD
}


def bound(buffers: Buffers) -> OnStream:
    """`reference.read_gates` for buffers that stay where they are; float32 and bfloat16 streams."""
    gates, state, rows = buffers.gates, buffers.gate_state, buffers.rows
    arrays = (
        *token_arrays(buffers),
        gates.count.numpy(),
        gates.ints.numpy(),
        gates.threshold.numpy(),
        state.events.numpy(),
        state.first_held.numpy(),
        rows_array(rows.W_enc),
        rows.params.numpy(),
        buffers.f.numpy(),
        buffers.input_norm.kind,
        np.float32(buffers.input_norm.eps),
    )

    return launcher(_KERNELS, arrays)
