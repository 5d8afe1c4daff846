"""The edit in one Triton launch: no allocation, no synchronisation, safe in a CUDA graph.

``steering/worker/ops/README.md`` says why it is built this way and what it costs.
"""

from __future__ import annotations

from functools import partial
from typing import Final, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sae.normalization import LAYER_NORM_EPS
from steering.request.limits import MAX_INTERVENTIONS
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SINKS,
    COVERS_SPECIAL,
    OP_ADD,
    OP_CLAMP,
    OP_FLOOR,
    OP_SCALE,
)
from steering.worker.ops import BoundKernel, Buffers
from steering.worker.ops.reference import NOT_COVERED, SKIPPED_SINK
from steering.worker.rows import (
    NORM_CONSTANT,
    NORM_LAYER,
    NUM_PARAMS,
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
from steering.worker.slots import E_COVERAGE, E_END, E_OP, E_ROW, E_START, NUM_INTS, EditTable

# A kernel sees only those globals that are constexpr.
_PROMPT, _GENERATION = tl.constexpr(COVERS_PROMPT), tl.constexpr(COVERS_GENERATION)
_SPECIAL, _SINKS = tl.constexpr(COVERS_SPECIAL), tl.constexpr(COVERS_SINKS)
_CLAMP, _SCALE, _ADD = tl.constexpr(OP_CLAMP), tl.constexpr(OP_SCALE), tl.constexpr(OP_ADD)
_FLOOR = tl.constexpr(OP_FLOOR)
_LAYER, _CONSTANT = tl.constexpr(float(NORM_LAYER)), tl.constexpr(float(NORM_CONSTANT))
_EPS = tl.constexpr(LAYER_NORM_EPS)
_ROW, _OP, _COVERAGE = tl.constexpr(E_ROW), tl.constexpr(E_OP), tl.constexpr(E_COVERAGE)
_START, _END, _NUM_INTS = tl.constexpr(E_START), tl.constexpr(E_END), tl.constexpr(NUM_INTS)
_BIAS, _GAIN = tl.constexpr(P_BIAS), tl.constexpr(P_GAIN)
_THRESHOLD, _GATE_BIAS = tl.constexpr(P_THRESHOLD), tl.constexpr(P_GATE_BIAS)
_DECODER_SCALE, _ENC_SUM = tl.constexpr(P_DECODER_SCALE), tl.constexpr(P_ENC_SUM)
_SINK, _NORM, _NUM_PARAMS = tl.constexpr(P_SINK), tl.constexpr(P_NORM), tl.constexpr(NUM_PARAMS)
_MAX_EDITS = tl.constexpr(MAX_INTERVENTIONS)
_NOT_COVERED, _SKIPPED_SINK = tl.constexpr(NOT_COVERED), tl.constexpr(SKIPPED_SINK)


class Launch(NamedTuple):
    """How one program is laid out.

    Attributes:
        block_d: lanes over ``d_in``, the next power of two.
        block_e: edits whose rows are in flight together.
        num_warps: warps of the program.
    """

    block_d: int
    block_e: int
    num_warps: int


# Lanes over d_in -> (block_e, num_warps) for 16-bit streams.
_LAUNCHES: Final = {1024: (4, 4), 2048: (2, 8), 4096: (4, 16), 8192: (2, 16)}


def launch(d_in: int, itemsize: int) -> Launch:
    """The layout for a width and a size of the stream's elements in bytes.

    As many rows in flight as the registers hold without spilling, as ``tests/bench/aot.py`` and
    ``tests/steering/test_triton_aot.py`` find with ptxas. Past 8192 some do spill.
    """
    block_d = max(1024, triton.next_power_of_2(d_in))
    block_e, num_warps = _LAUNCHES.get(block_d, (1, 32))
    if itemsize == 4 and block_d >= 4096:
        block_e //= 2
    return Launch(block_d, max(1, block_e), num_warps)


def steer_tokens(
    hidden_states: Tensor,
    residual: Tensor | None,
    token_slot: Tensor,
    positions: Tensor,
    input_ids: Tensor,
    is_special: Tensor,
    prompt_len: Tensor,
    table: EditTable,
    rows: RowPool,
    report_f: Tensor | None = None,
    reports: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """Same as :func:`steering.worker.ops.reference.steer_tokens`, as one kernel launch.

    Every address it reads is fixed but those of ``hidden_states`` and ``residual``, so a captured
    launch follows whatever the next step writes into ``token_slot`` and the tables.
    """
    num_tokens, d_in = hidden_states.shape
    assert hidden_states.stride(1) == 1, hidden_states.stride()
    assert residual is None or residual.stride(1) == 1, residual.stride()
    assert (report_f is None) == (reports is None), "report_f and reports go together"
    assert report_f is None or report_f.is_contiguous()
    if not num_tokens:
        return
    layout = launch(d_in, hidden_states.element_size())
    steer_kernel[(num_tokens,)](
        hidden_states,
        residual,
        token_slot,
        positions,
        input_ids,
        is_special,
        prompt_len,
        table.count,
        table.ints,
        table.value,
        rows.W_enc,
        rows.W_dec,
        rows.params,
        report_f,
        reports,
        counters,
        hidden_states.stride(0),
        0 if residual is None else residual.stride(0),
        D_IN=d_in,
        BLOCK_D=layout.block_d,
        BLOCK_E=layout.block_e,
        num_warps=layout.num_warps,
        enable_fp_fusion=True,  # said aloud: Triton 3.10 changes the default
    )


def bound(buffers: Buffers) -> BoundKernel:
    """`steer_tokens` of buffers that stay where they are."""
    return partial(steer_tokens, **buffers._asdict())


@triton.jit
def steer_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [num_tokens, D_IN] model dtype, read and written
    residual_ptr,  # the same shape, or None
    token_slot_ptr,  # [num_tokens] int32
    positions_ptr,  # [num_tokens] int64
    input_ids_ptr,  # [num_tokens] int32
    is_special_ptr,  # [vocab_size] bool
    prompt_len_ptr,  # [num_slots] int32
    count_ptr,  # [num_slots] int32
    ints_ptr,  # [num_slots, MAX_EDITS, NUM_INTS] int32
    value_ptr,  # [num_slots, MAX_EDITS] float32
    w_enc_ptr,  # [capacity, D_IN] float32
    w_dec_ptr,  # [capacity, D_IN] float32
    params_ptr,  # [capacity, NUM_PARAMS] float32
    report_f_ptr,  # [num_tokens, MAX_EDITS] float32, or None
    reports_ptr,  # [num_slots] int32, or None
    counters_ptr,  # [2] int64, or None
    hidden_stride,
    residual_stride,
    D_IN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program a token t; E = the edits of its slot that cover it and meet no sink::

        x         = float32(hidden[t]) + float32(residual[t])
        z_i       = W_enc[i] @ x
        a_i       = gain_i * z_i + bias_i
        f_i       = a_i if a_i > threshold_i and z_i + gate_bias_i > 0 else 0
        delta     = sum_{i in E} (op_i(f_i) - f_i) * s_i * g_i * W_dec[i]
        hidden[t] = dtype(float32(hidden[t]) + delta)

    ``g = 1``, but layer norm: ``z_i = (W_enc[i] @ x - mean(x) * sum(W_enc[i])) / (std(x) + eps)``,
    ``g = std(x)``; constant norm: ``z_i = W_enc[i] @ x / g``, ``g = |x| / sqrt(D_IN)``.
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
    phase = tl.where(position < tl.load(prompt_len_ptr + slot), _PROMPT, _GENERATION)
    # Bits that an edit's coverage must have on this token.
    needed = phase | tl.where(special, _SPECIAL, 0)
    reported = 0  # columns of report_f to write
    if report_f_ptr is not None:
        reported = tl.where(tl.load(reports_ptr + slot) != 0, count, 0)

    # All of the slot's edits at once: a token that none covers costs no stream.
    every = tl.arange(0, _MAX_EDITS)
    exists = every < count
    ints = ints_ptr + (slot * _MAX_EDITS + every) * _NUM_INTS
    report = report_f_ptr + token * _MAX_EDITS + every if report_f_ptr is not None else None
    coverage = tl.load(ints + _COVERAGE, mask=exists, other=0)
    covered = exists & (coverage & needed == needed)
    covered &= position >= tl.load(ints + _START, mask=exists, other=0)
    covered &= position < tl.load(ints + _END, mask=exists, other=0)
    if tl.max(covered.to(tl.int32)) == 0:
        if report_f_ptr is not None:
            nothing = tl.full([_MAX_EDITS], _NOT_COVERED, tl.float32)
            tl.store(report, nothing, mask=every < reported)
        return

    d = tl.arange(0, BLOCK_D)
    inside = d < D_IN
    hidden_at = hidden_ptr + token * hidden_stride + d
    hidden = tl.load(hidden_at, mask=inside, other=0.0)
    x = hidden.to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + token * residual_stride + d, mask=inside, other=0.0)
        x += residual.to(tl.float32)
    square = tl.sum(x * x)
    norm = tl.sqrt_rn(square)
    rms = tl.sqrt_rn(square / D_IN)

    params = params_ptr + tl.load(ints + _ROW, mask=covered, other=0).to(tl.int64) * _NUM_PARAMS
    sink = (norm > tl.load(params + _SINK, mask=covered, other=0.0)) & (coverage & _SINKS == 0)
    active = covered & ~sink
    if report_f_ptr is not None:
        why = tl.where(covered, _SKIPPED_SINK, _NOT_COVERED)
        tl.store(report, why, mask=~active & (every < reported))
    if counters_ptr is not None:
        skipped = tl.max((covered & sink).to(tl.int32)) != 0
        tl.atomic_add(counters_ptr + 1, 1, mask=skipped, sem="relaxed")
    # One bit an edit: the loop below takes its few from here instead of matching again.
    active_bits = tl.sum(tl.where(active, tl.full([_MAX_EDITS], 1, tl.int64) << every, 0))
    if active_bits == 0:
        return
    if counters_ptr is not None:
        tl.atomic_add(counters_ptr, 1, sem="relaxed")

    mean = 0.0
    std = 0.0
    layer = tl.load(params + _NORM, mask=active, other=0.0) == _LAYER
    if tl.max(layer.to(tl.int32)) != 0:
        mean = tl.sum(x) / D_IN
        off = tl.where(inside, x - mean, 0.0)
        std = tl.sqrt_rn(tl.sum(off * off) / (D_IN - 1))

    delta = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, count, BLOCK_E):
        delta += _block_delta(
            x, mean, std, rms, first + tl.arange(0, BLOCK_E), active_bits, reported,
            ints_ptr + slot * _MAX_EDITS * _NUM_INTS, value_ptr + slot * _MAX_EDITS,
            w_enc_ptr, w_dec_ptr, params_ptr, report_f_ptr, token, d, inside, D_IN,
        )  # fmt: skip
    # Without a residual, x is the hidden state; holding both would spill.
    before = x if residual_ptr is None else hidden.to(tl.float32)
    tl.store(hidden_at, (before + delta).to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _block_delta(  # type: ignore[no-untyped-def]
    x, mean, std, rms, e, active_bits, reported,
    ints_ptr, value_ptr, w_enc_ptr, w_dec_ptr, params_ptr, report_f_ptr, token, d, inside,
    D_IN: tl.constexpr,
):  # fmt: skip
    """What the edits ``e`` of a slot add to the stream; they share one wait for their rows."""
    active = (active_bits >> e) & 1 != 0
    row = tl.load(ints_ptr + e * _NUM_INTS + _ROW, mask=active, other=0).to(tl.int64)
    op = tl.load(ints_ptr + e * _NUM_INTS + _OP, mask=active, other=0)

    # Both rows are asked for before either is used. A masked row costs no traffic.
    tile = row[:, None] * D_IN + d[None, :]
    reads = active & ((op != _ADD) | (e < reported))
    w_enc = tl.load(w_enc_ptr + tile, mask=reads[:, None] & inside[None, :], other=0.0)
    w_dec = tl.load(w_dec_ptr + tile, mask=active[:, None] & inside[None, :], other=0.0)

    z = tl.sum(w_enc * x[None, :], axis=1)
    params = params_ptr + row * _NUM_PARAMS
    kind = tl.load(params + _NORM)
    centred = (z - mean * tl.load(params + _ENC_SUM)) / (std + _EPS)
    z = tl.where(kind == _LAYER, centred, tl.where(kind == _CONSTANT, z / rms, z))
    g = tl.where(kind == _LAYER, std, tl.where(kind == _CONSTANT, rms, 1.0))
    a = tl.load(params + _GAIN) * z + tl.load(params + _BIAS)
    fires = (a > tl.load(params + _THRESHOLD)) & (z + tl.load(params + _GATE_BIAS) > 0)
    f = tl.where(fires, a, 0.0)
    if report_f_ptr is not None:
        tl.store(report_f_ptr + token * _MAX_EDITS + e, f, mask=active & (e < reported))
    change = _change(f, op, tl.load(value_ptr + e, mask=active, other=0.0))
    change *= tl.load(params + _DECODER_SCALE) * g
    # Of an edit that is not active this may be anything, and the zeros of its row do not undo inf.
    return tl.sum(tl.where(active, change, 0.0)[:, None] * w_dec, axis=0)


@triton.jit
def _change(f, op, value):  # type: ignore[no-untyped-def]
    """``f' - f`` for each operation; ``add`` never reads ``f``."""
    scale = value * f - f
    floor = tl.maximum(f, value) - f
    cap = tl.minimum(f, value) - f
    rest = tl.where(op == _SCALE, scale, tl.where(op == _FLOOR, floor, cap))
    return tl.where(op == _CLAMP, value - f, tl.where(op == _ADD, value, rest))
