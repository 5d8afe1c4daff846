"""What the CPU's kernels are made of: loads and stores, products, one activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import llvmlite.binding.ffi
import numpy as np
import torch
from numba import njit
from torch import Tensor

from steering.worker.ops.buffers import Buffers
from steering.worker.ops.layout import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SPECIAL,
    E_COVERAGE,
    E_END,
    E_START,
    INPUT_LAYER,
    INPUT_PLAIN,
    LAYER_NORM_EPS,
    MAX_INTERVENTIONS,
    NORM_CONSTANT,
    NORM_LAYER,
    OP_ADD,
    OP_CLAMP,
    OP_FLOOR,
    OP_SCALE,
    P_BIAS,
    P_ENC_SUM,
    P_GAIN,
    P_GATE_BIAS,
    P_NORM,
    P_THRESHOLD,
)


def _answer_no_dunder(library: type) -> None:
    """Make a handle of a shared library raise AttributeError for names such as ``__dict__``.

    llvmlite's handle takes every name for a function of the library. When vLLM starts an engine on
    a CPU, it looks at the ``__dict__`` of everything that a module holds, and fails on what it
    gets.
    """
    function: Callable[[object, str], Any] = library.__getattr__  # type: ignore[attr-defined]

    def __getattr__(self: object, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return function(self, name)

    library.__getattr__ = __getattr__  # type: ignore[attr-defined]


_answer_no_dunder(llvmlite.binding.ffi._lib_wrapper)

# Sums may be taken in vector lanes. Infinities and NaN keep their meaning: thresholds use them.
compiled: Final[Any] = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")

EPS: Final = np.float32(LAYER_NORM_EPS)
ZERO: Final = np.float32(0)
ONE: Final = np.float32(1)
#: How many rows are read together.
BLOCK: Final = 4
_HALF, _SIXTEEN = np.uint32(0x7FFF), np.uint32(16)
_BFLOAT16_NAN = np.uint16(0x7FC0)


@compiled
def load_float32(source, start, x):  # type: ignore[no-untyped-def]
    # A slice, since the compiler does not vectorize a loop whose index may be negative, as it must
    # assume of `start + i`.
    row = source[start : start + x.shape[0]]
    for i in range(x.shape[0]):
        x[i] = row[i]


@compiled
def store_float32(target, start, y):  # type: ignore[no-untyped-def]
    row = target[start : start + y.shape[0]]
    for i in range(y.shape[0]):
        row[i] = y[i]


@compiled
def load_bfloat16(source, start, x):  # type: ignore[no-untyped-def]
    """Load bfloat16, which is the upper half of a float32."""
    bits, row = x.view(np.uint32), source[start : start + x.shape[0]]
    for i in range(bits.shape[0]):
        bits[i] = np.uint32(row[i]) << _SIXTEEN


@compiled
def store_bfloat16(target, start, y):  # type: ignore[no-untyped-def]
    """Store as bfloat16, rounded to the nearest, ties to even, as torch does."""
    bits, row = y.view(np.uint32), target[start : start + y.shape[0]]
    for i in range(bits.shape[0]):
        rounded = bits[i] + _HALF + ((bits[i] >> _SIXTEEN) & np.uint32(1))
        upper = np.uint16(rounded >> _SIXTEEN)
        row[i] = upper if y[i] == y[i] else _BFLOAT16_NAN


@compiled
def add(a, y):  # type: ignore[no-untyped-def]
    for i in range(y.shape[0]):
        y[i] += a[i]


@compiled
def square(x):  # type: ignore[no-untyped-def]
    total = ZERO
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return total


@compiled
def encode(w_enc, row, x, z):  # type: ignore[no-untyped-def]
    """``z = W_enc[row] @ x`` for four rows, so that ``x`` is loaded once for them."""
    a, b, c, d = w_enc[row[0]], w_enc[row[1]], w_enc[row[2]], w_enc[row[3]]
    za = zb = zc = zd = ZERO
    for i in range(x.shape[0]):
        za += a[i] * x[i]
        zb += b[i] * x[i]
        zc += c[i] * x[i]
        zd += d[i] * x[i]
    z[0], z[1], z[2], z[3] = za, zb, zc, zd


@compiled
def decode(w_dec, row, factor, delta):  # type: ignore[no-untyped-def]
    """``delta += factor @ W_dec[row]`` for four rows."""
    a, b, c, d = w_dec[row[0]], w_dec[row[1]], w_dec[row[2]], w_dec[row[3]]
    fa, fb, fc, fd = factor[0], factor[1], factor[2], factor[3]
    for i in range(delta.shape[0]):
        delta[i] += fa * a[i] + fb * b[i] + fc * c[i] + fd * d[i]


@compiled
def moments(x, centred):  # type: ignore[no-untyped-def]
    """Mean and unbiased standard deviation of ``x``; ``centred`` is room for as many numbers."""
    mean = ZERO
    for i in range(x.shape[0]):
        mean += x[i]
    mean /= np.float32(x.shape[0])
    for i in range(x.shape[0]):
        centred[i] = x[i] - mean
    return mean, np.sqrt(square(centred) / np.float32(x.shape[0] - 1))


@compiled
def input_normed(x, kind, eps):  # type: ignore[no-untyped-def]
    """Apply a hook point's input norm to ``x``, in place."""
    if kind == INPUT_PLAIN:
        return
    if kind == INPUT_LAYER:
        mean = ZERO
        for i in range(x.shape[0]):
            mean += x[i]
        mean /= np.float32(x.shape[0])
        for i in range(x.shape[0]):
            x[i] -= mean
    scale = ONE / np.sqrt(square(x) / np.float32(x.shape[0]) + eps)
    for i in range(x.shape[0]):
        x[i] *= scale


@compiled
def normed(z, param, mean, std, rms):  # type: ignore[no-untyped-def]
    """``W_enc @ norm_in(x)`` from ``z = W_enc @ x``."""
    if param[P_NORM] == NORM_LAYER:
        return (z - mean * param[P_ENC_SUM]) / (std + EPS)
    if param[P_NORM] == NORM_CONSTANT:
        return z / rms
    return z


@compiled
def preactivation(z, param):  # type: ignore[no-untyped-def]
    """What the activation function is applied to."""
    return param[P_GAIN] * z + param[P_BIAS]


@compiled
def applied(f, op, value):  # type: ignore[no-untyped-def]
    """``f'`` for each operation."""
    if op == OP_CLAMP:
        return value
    if op == OP_ADD:
        return f + value
    if op == OP_SCALE:
        return value * f
    if op == OP_FLOOR:
        return max(f, value)
    return min(f, value)


@compiled
def activation(z, param, mean, std, rms):  # type: ignore[no-untyped-def]
    """Pre-activation and activation from ``z = W_enc @ x``."""
    read_z = normed(z, param, mean, std, rms)
    p = preactivation(read_z, param)
    return p, p if p > param[P_THRESHOLD] and read_z + param[P_GATE_BIAS] > ZERO else ZERO


@compiled
def output_scale(param, std, rms):  # type: ignore[no-untyped-def]
    """g, by which the output of an SAE with a normalized input is multiplied."""
    if param[P_NORM] == NORM_LAYER:
        return std
    return rms if param[P_NORM] == NORM_CONSTANT else ONE


@compiled
def needed_coverage(position, prompt_len, special):  # type: ignore[no-untyped-def]
    """Bits that an edit's coverage must have on a token."""
    needed = COVERS_PROMPT if position < prompt_len else COVERS_GENERATION
    return needed | COVERS_SPECIAL if special else needed


@compiled
def covers(edit, needed, position):  # type: ignore[no-untyped-def]
    return edit[E_COVERAGE] & needed == needed and edit[E_START] <= position < edit[E_END]


#: By dtype of the stream.
LOAD: Final = {torch.float32: load_float32, torch.bfloat16: load_bfloat16}
STORE: Final = {torch.float32: store_float32, torch.bfloat16: store_bfloat16}


def stream_reader(load: Any, load_residual: Any) -> Any:
    """A function that puts a token's stream into ``x``, for one pair of dtypes.

    Args:
        load: reads a row of hidden states, from `LOAD`.
        load_residual: reads a row of the residual, from `LOAD`.
    """

    @compiled
    def read_stream(hidden, start, residual, residual_start, x, other):  # type: ignore[no-untyped-def]
        load(hidden, start, x)
        if residual.shape[0] > 0:
            load_residual(residual, residual_start, other)
            add(other, x)

    return read_stream


def rows_array(matrix: Tensor) -> Any:
    """All columns ``[capacity, width]`` of the pool's rows, of which ``matrix`` has the first.

    A contiguous array is read faster; the kernels stop at the stream's width.
    """
    assert matrix.storage_offset() == 0 and matrix.stride(1) == 1, matrix.stride()
    capacity, width = matrix.shape[0], matrix.stride(0)
    return matrix.as_strided((capacity, width), (width, 1)).numpy()


def carried_array(buffers: Buffers) -> Any:
    """`Buffers.carried`, or a single row that nobody reads if it is None."""
    if buffers.carried is None:
        return np.zeros((1, MAX_INTERVENTIONS), dtype=np.float32)
    return buffers.carried.numpy()


def token_arrays(buffers: Buffers) -> tuple[Any, ...]:
    """What every kernel takes right after the stream: what each token is, and prompt lengths."""
    return (
        buffers.token_slot.numpy(),
        buffers.positions.numpy(),
        buffers.input_ids.numpy(),
        buffers.is_special.numpy(),
        buffers.slots.prompt_len.numpy(),
    )
