"""What the Triton kernels are made of: columns, codes, a token's stream, a latent read on it."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from steering.worker.ops import layout
from steering.worker.ops.buffers import Buffers

# A kernel sees only those globals that are constexpr.
MAX_EDITS = tl.constexpr(layout.MAX_INTERVENTIONS)
MAX_GATES = tl.constexpr(layout.MAX_GATES)
MAX_ENTRIES = tl.constexpr(layout.MAX_ENTRIES)
FIRST_GATE_COLUMN = tl.constexpr(layout.FIRST_GATE_COLUMN)
EDIT_INTS, GATE_INTS = tl.constexpr(layout.NUM_EDIT_INTS), tl.constexpr(layout.NUM_GATE_INTS)
NUM_PARAMS = tl.constexpr(layout.NUM_PARAMS)
BIAS, GAIN = tl.constexpr(layout.P_BIAS), tl.constexpr(layout.P_GAIN)
THRESHOLD, GATE_BIAS = tl.constexpr(layout.P_THRESHOLD), tl.constexpr(layout.P_GATE_BIAS)
DECODER_SCALE, ENC_SUM = tl.constexpr(layout.P_DECODER_SCALE), tl.constexpr(layout.P_ENC_SUM)
SINK, NORM = tl.constexpr(layout.P_SINK), tl.constexpr(layout.P_NORM)
LAYER = tl.constexpr(float(layout.NORM_LAYER))
CONSTANT = tl.constexpr(float(layout.NORM_CONSTANT))
PROMPT, GENERATION = tl.constexpr(layout.COVERS_PROMPT), tl.constexpr(layout.COVERS_GENERATION)
SPECIAL, SINKS = tl.constexpr(layout.COVERS_SPECIAL), tl.constexpr(layout.COVERS_SINKS)
COVERAGE = tl.constexpr(layout.E_COVERAGE)
START, END = tl.constexpr(layout.E_START), tl.constexpr(layout.E_END)
EPS = tl.constexpr(layout.LAYER_NORM_EPS)
PLAIN, CENTRED = tl.constexpr(layout.INPUT_PLAIN), tl.constexpr(layout.INPUT_LAYER)
_CLAMP, _SCALE = tl.constexpr(layout.OP_CLAMP), tl.constexpr(layout.OP_SCALE)
_ADD, _FLOOR = tl.constexpr(layout.OP_ADD), tl.constexpr(layout.OP_FLOOR)


class Launch(NamedTuple):
    """How one program is laid out.

    Attributes:
        block_d: lanes over ``d_in``: the next power of two, at least 1024.
        block_e: how many entries have their rows in flight together.
        num_warps: warps of the program.
    """

    block_d: int
    block_e: int
    num_warps: int


# (block_e, num_warps) for 16-bit streams, by lanes over d_in.
_LAUNCHES: Final = {1024: (4, 4), 2048: (2, 8), 4096: (4, 16), 8192: (2, 16)}


def layout_for(d_in: int, itemsize: int) -> Launch:
    """The layout for a stream of this width and this size of its elements in bytes.

    It has as many rows in flight as the registers hold without spilling, as ``tests/bench/aot.py``
    and ``tests/steering/test_triton_aot.py`` find with ptxas. Past a width of 8192 some do spill.
    """
    block_d = max(1024, triton.next_power_of_2(d_in))
    block_e, num_warps = _LAUNCHES.get(block_d, (1, 32))
    if itemsize == 4 and block_d >= 4096:
        block_e //= 2
    return Launch(block_d, max(1, block_e), num_warps)


def launch(
    kernel: Any,
    hidden_states: Tensor,
    residual: Tensor | None,
    buffers: Buffers,
    pointers: tuple[Any, ...],
    numbers: tuple[Any, ...],
    shape: Launch,
    **constants: Any,
) -> None:
    """Run one program for each token.

    Args:
        kernel: the kernel. Its first arguments are the stream and what each token is.
        hidden_states: ``[num_tokens, d_in]``, rows contiguous.
        residual: the same shape, or None.
        buffers: the buffers of the hook point.
        pointers: what the kernel takes after ``prompt_len``.
        numbers: what it takes after the two strides of the stream.
        shape: the layout of a program.
        constants: the kernel's further compile-time constants.
    """
    num_tokens, d_in = hidden_states.shape
    assert hidden_states.stride(1) == 1, hidden_states.stride()
    assert residual is None or residual.stride(1) == 1, residual.stride()
    if not num_tokens:
        return
    kernel[(num_tokens,)](
        hidden_states,
        residual,
        buffers.token_slot,
        buffers.positions,
        buffers.input_ids,
        buffers.is_special,
        buffers.slots.prompt_len,
        *pointers,
        hidden_states.stride(0),
        0 if residual is None else residual.stride(0),
        *numbers,
        D_IN=d_in,
        ROW_STRIDE=buffers.rows.W_enc.stride(0),
        BLOCK_D=shape.block_d,
        BLOCK_E=shape.block_e,
        num_warps=shape.num_warps,
        enable_fp_fusion=True,  # explicit, since Triton 3.10 changes the default
        **constants,
    )


@triton.jit
def coverage_at(ints, exists, position, special, prompt_len):  # type: ignore[no-untyped-def]
    """Coverage of a slot's edits, and which of them cover a token if it is no sink."""
    phase = tl.where(position < prompt_len, PROMPT, GENERATION)
    # Bits that an edit's coverage must have on this token.
    needed = phase | tl.where(special, SPECIAL, 0)
    coverage = tl.load(ints + COVERAGE, mask=exists, other=0)
    covered = exists & (coverage & needed == needed)
    covered &= position >= tl.load(ints + START, mask=exists, other=0)
    covered &= position < tl.load(ints + END, mask=exists, other=0)
    return coverage, covered


@triton.jit
def with_residual(hidden, residual_ptr, at, inside):  # type: ignore[no-untyped-def]
    """A token's stream in float32: hidden states, plus the residual at ``at`` if there is one."""
    x = hidden.to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def norms(x, D_IN: tl.constexpr):  # type: ignore[no-untyped-def]
    """``|x|`` and ``|x| / sqrt(d_in)``."""
    square = tl.sum(x * x)
    return tl.sqrt_rn(square), tl.sqrt_rn(square / D_IN)


@triton.jit
def moments_if_asked(x, inside, params, wanted, D_IN: tl.constexpr):  # type: ignore[no-untyped-def]
    """`moments` if the SAE of a wanted latent has a layer norm, else zeros."""
    mean = 0.0
    std = 0.0
    layer = tl.load(params + NORM, mask=wanted, other=0.0) == LAYER
    if tl.max(layer.to(tl.int32)) != 0:
        mean, std = moments(x, inside, D_IN)
    return mean, std


@triton.jit
def input_normed(x, inside, eps, KIND: tl.constexpr, D_IN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A token's stream after the hook point's input norm."""
    if KIND == PLAIN:
        return x
    if KIND == CENTRED:
        x = tl.where(inside, x - tl.sum(x) / D_IN, 0.0)
    return x / tl.sqrt_rn(tl.sum(x * x) / D_IN + eps)


@triton.jit
def moments(x, inside, D_IN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and unbiased standard deviation of a token's stream."""
    mean = tl.sum(x) / D_IN
    off = tl.where(inside, x - mean, 0.0)
    return mean, tl.sqrt_rn(tl.sum(off * off) / (D_IN - 1))


@triton.jit
def read_latents(z, params, mean, std, rms):  # type: ignore[no-untyped-def]
    """Pre-activation, activation, threshold and output scale of latents with ``z = W_enc @ x``."""
    kind = tl.load(params + NORM)
    centred = (z - mean * tl.load(params + ENC_SUM)) / (std + EPS)
    z = tl.where(kind == LAYER, centred, tl.where(kind == CONSTANT, z / rms, z))
    g = tl.where(kind == LAYER, std, tl.where(kind == CONSTANT, rms, 1.0))
    p = tl.load(params + GAIN) * z + tl.load(params + BIAS)
    threshold = tl.load(params + THRESHOLD)
    fires = (p > threshold) & (z + tl.load(params + GATE_BIAS) > 0)
    return p, tl.where(fires, p, 0.0), threshold, g


@triton.jit
def applied(f, op, value):  # type: ignore[no-untyped-def]
    """``f'`` for each operation."""
    rest = tl.where(op == _FLOOR, tl.maximum(f, value), tl.minimum(f, value))
    rest = tl.where(op == _SCALE, value * f, rest)
    return tl.where(op == _CLAMP, value, tl.where(op == _ADD, f + value, rest))
