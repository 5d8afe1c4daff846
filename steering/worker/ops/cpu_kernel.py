"""The edit on a CPU in one compiled call: no tensor is made, no token of another request touched.

Compiled by Numba, which comes with vLLM, when the worker starts: no compiler has to be installed.
A token's sums do not depend on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import llvmlite.binding.ffi
import numpy as np
import torch
from numba import njit
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
    P_BIAS,
    P_DECODER_SCALE,
    P_ENC_SUM,
    P_GAIN,
    P_GATE_BIAS,
    P_NORM,
    P_SINK,
    P_THRESHOLD,
)
from steering.worker.slots import E_COVERAGE, E_END, E_OP, E_ROW, E_START, NO_SLOT


def _answer_no_dunder(library: type) -> None:
    """Let a handle of a shared library have no attribute such as ``__dict__``.

    llvmlite's takes every name for a function of the library. vLLM, when it starts an engine on a
    CPU, looks into the ``__dict__`` of all that every module holds, and ends on what it gets there.
    """
    function: Callable[[object, str], Any] = library.__getattr__  # type: ignore[attr-defined]

    def __getattr__(self: object, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return function(self, name)

    library.__getattr__ = __getattr__  # type: ignore[attr-defined]


_answer_no_dunder(llvmlite.binding.ffi._lib_wrapper)

# Sums may be taken in vector lanes. Infinities and NaN keep their meaning: thresholds use them.
_compiled: Final[Any] = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")

_EPS = np.float32(LAYER_NORM_EPS)
_NOT_COVERED, _SKIPPED_SINK = np.float32(NOT_COVERED), np.float32(SKIPPED_SINK)
_ZERO, _ONE = np.float32(0), np.float32(1)
_HALF, _SIXTEEN = np.uint32(0x7FFF), np.uint32(16)
_BFLOAT16_NAN = np.uint16(0x7FC0)
_BLOCK: Final = 4  # edits whose rows are read together


@_compiled
def _load_float32(source, start, x):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        x[i] = source[start + i]


@_compiled
def _store_float32(target, start, y):  # type: ignore[no-untyped-def]
    for i in range(y.shape[0]):
        target[start + i] = y[i]


@_compiled
def _load_bfloat16(source, start, x):  # type: ignore[no-untyped-def]
    """A bfloat16 is the upper half of a float32."""
    bits = x.view(np.uint32)
    for i in range(bits.shape[0]):
        bits[i] = np.uint32(source[start + i]) << _SIXTEEN


@_compiled
def _store_bfloat16(target, start, y):  # type: ignore[no-untyped-def]
    """Round to the nearest, ties to even, as torch does."""
    bits = y.view(np.uint32)
    for i in range(bits.shape[0]):
        rounded = bits[i] + _HALF + ((bits[i] >> _SIXTEEN) & np.uint32(1))
        upper = np.uint16(rounded >> _SIXTEEN)
        target[start + i] = upper if y[i] == y[i] else _BFLOAT16_NAN


@_compiled
def _add(a, y):  # type: ignore[no-untyped-def]
    for i in range(y.shape[0]):
        y[i] += a[i]


@_compiled
def _square(x):  # type: ignore[no-untyped-def]
    total = _ZERO
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return total


@_compiled
def _encode(w_enc, row, x, z):  # type: ignore[no-untyped-def]
    """``z = W_enc[row] @ x`` for four rows, so that ``x`` is loaded once for them."""
    a, b, c, d = w_enc[row[0]], w_enc[row[1]], w_enc[row[2]], w_enc[row[3]]
    za = zb = zc = zd = _ZERO
    for i in range(x.shape[0]):
        za += a[i] * x[i]
        zb += b[i] * x[i]
        zc += c[i] * x[i]
        zd += d[i] * x[i]
    z[0], z[1], z[2], z[3] = za, zb, zc, zd


@_compiled
def _decode(w_dec, row, factor, delta):  # type: ignore[no-untyped-def]
    """``delta += factor @ W_dec[row]`` for four rows."""
    a, b, c, d = w_dec[row[0]], w_dec[row[1]], w_dec[row[2]], w_dec[row[3]]
    fa, fb, fc, fd = factor[0], factor[1], factor[2], factor[3]
    for i in range(delta.shape[0]):
        delta[i] += fa * a[i] + fb * b[i] + fc * c[i] + fd * d[i]


@_compiled
def _change(f, op, value):  # type: ignore[no-untyped-def]
    """``f' - f`` for each operation; ``add`` never reads ``f``."""
    if op == OP_CLAMP:
        return value - f
    if op == OP_ADD:
        return value
    if op == OP_SCALE:
        return value * f - f
    if op == OP_FLOOR:
        return max(f, value) - f
    return min(f, value) - f


@_compiled
def _covers(edit, needed, position):  # type: ignore[no-untyped-def]
    return edit[E_COVERAGE] & needed == needed and edit[E_START] <= position < edit[E_END]


def _kernel(load: Any, store: Any, load_residual: Any) -> Any:
    """The loop over tokens for one pair of dtypes, which these three know."""

    @_compiled
    def steer(  # type: ignore[no-untyped-def]
        hidden, hidden_stride,  # 1-D storage of [num_tokens, d_in], read and written
        residual, residual_stride,  # the same; empty: the layer returns the sum
        num_tokens, token_slot, positions, input_ids, is_special, prompt_len,
        count, ints, value, w_enc, w_dec, params, report_f, reports, counters,
    ):  # fmt: skip
        d_in = w_enc.shape[1]
        x, other = np.empty(d_in, np.float32), np.empty(d_in, np.float32)
        delta = np.empty(d_in, np.float32)
        active = np.empty(MAX_INTERVENTIONS + _BLOCK, np.int64)  # which of the slot's edits
        row = np.empty(_BLOCK, np.int64)
        z, factor = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
        for token in range(num_tokens):
            slot = token_slot[token]
            if slot == NO_SLOT or count[slot] == 0:
                continue
            position = positions[token]
            # Bits that an edit's coverage must have on this token.
            needed = COVERS_PROMPT if position < prompt_len[slot] else COVERS_GENERATION
            if position == 0 or is_special[input_ids[token]]:
                needed |= COVERS_SPECIAL
            reported = reports.shape[0] > 0 and reports[slot] != 0
            num_covered = 0
            for i in range(count[slot]):
                if _covers(ints[slot, i], needed, position):
                    active[num_covered] = i
                    num_covered += 1
                elif reported:
                    report_f[token, i] = _NOT_COVERED
            if num_covered == 0:
                continue

            load(hidden, token * hidden_stride, x)
            if residual.shape[0] > 0:
                load_residual(residual, token * residual_stride, other)
                _add(other, x)
            norm = np.sqrt(_square(x))
            num_active = 0
            any_layer_norm = False
            for k in range(num_covered):
                i = active[k]
                param = params[ints[slot, i, E_ROW]]
                if norm > param[P_SINK] and not ints[slot, i, E_COVERAGE] & COVERS_SINKS:
                    if reported:
                        report_f[token, i] = _SKIPPED_SINK
                    continue
                active[num_active] = i
                num_active += 1
                any_layer_norm |= param[P_NORM] == NORM_LAYER
            counters[1] += num_active < num_covered
            if num_active == 0:
                continue
            counters[0] += 1

            rms = norm / np.sqrt(np.float32(d_in))
            mean = std = _ZERO
            if any_layer_norm:
                for i in range(d_in):
                    mean += x[i]
                mean /= np.float32(d_in)
                for i in range(d_in):
                    other[i] = x[i] - mean
                std = np.sqrt(_square(other) / np.float32(d_in - 1))

            delta[:] = _ZERO
            for first in range(0, num_active, _BLOCK):
                reads = False
                for k in range(_BLOCK):
                    # The last block repeats its last edit, with a factor of zero.
                    i = active[min(first + k, num_active - 1)]
                    row[k] = ints[slot, i, E_ROW]
                    reads |= reported or ints[slot, i, E_OP] != OP_ADD
                if reads:
                    _encode(w_enc, row, x, z)
                factor[:] = _ZERO
                for k in range(min(_BLOCK, num_active - first)):
                    i = active[first + k]
                    param = params[row[k]]
                    layer, constant = param[P_NORM] == NORM_LAYER, param[P_NORM] == NORM_CONSTANT
                    f = _ZERO
                    if reads:
                        normed = z[k]
                        if layer:
                            normed = (normed - mean * param[P_ENC_SUM]) / (std + _EPS)
                        elif constant:
                            normed /= rms
                        act = param[P_GAIN] * normed + param[P_BIAS]
                        if act > param[P_THRESHOLD] and normed + param[P_GATE_BIAS] > _ZERO:
                            f = act
                    if reported:
                        report_f[token, i] = f
                    g = std if layer else rms if constant else _ONE
                    change = _change(f, ints[slot, i, E_OP], value[slot, i])
                    factor[k] = change * param[P_DECODER_SCALE] * g
                _decode(w_dec, row, factor, delta)
            load(hidden, token * hidden_stride, other)
            _add(other, delta)
            store(hidden, token * hidden_stride, delta)

    return steer


_LOAD: Final = {torch.float32: _load_float32, torch.bfloat16: _load_bfloat16}
_STORE: Final = {torch.float32: _store_float32, torch.bfloat16: _store_bfloat16}
#: By dtype of the hidden states and of the residual; each is compiled when it is first called.
_KERNELS: Final[dict[tuple[torch.dtype, torch.dtype], Callable[..., None]]] = {
    (hidden, residual): _kernel(_LOAD[hidden], _STORE[hidden], _LOAD[residual])
    for hidden in _LOAD
    for residual in _LOAD
}
_NO_REPORT: Final = np.empty((0, 0), np.float32), np.empty(0, np.int32)


def edits(dtype: torch.dtype) -> bool:
    """Whether the kernel can edit a stream of this dtype (not float16)."""
    return dtype in _LOAD


def bound(buffers: Buffers) -> BoundKernel:
    """`steer_tokens` of buffers that stay where they are: taken apart once, not in every pass.

    Found again from Python in every pass, with cold caches, they cost as much as the edit itself.
    """
    table, rows, report_f, reports = buffers.table, buffers.rows, buffers.report_f, buffers.reports
    assert (report_f is None) == (reports is None), "report_f and reports go together"
    report_f_np, reports_np = _NO_REPORT
    if report_f is not None and reports is not None:
        report_f_np, reports_np = report_f.numpy(), reports.numpy()
    arrays = (
        buffers.token_slot.numpy(),
        buffers.positions.numpy(),
        buffers.input_ids.numpy(),
        buffers.is_special.numpy(),
        buffers.prompt_len.numpy(),
        table.count.numpy(),
        table.ints.numpy(),
        table.value.numpy(),
        rows.W_enc.numpy(),
        rows.W_dec.numpy(),
        rows.params.numpy(),
        report_f_np,
        reports_np,
        np.zeros(2, np.int64) if buffers.counters is None else buffers.counters.numpy(),
    )

    def launch(hidden_states: Tensor, residual: Tensor | None) -> None:
        num_tokens = hidden_states.shape[0]
        if not num_tokens:
            return
        dtype = hidden_states.dtype
        hidden = _storage(hidden_states)
        if residual is None:
            kernel, other, stride = _KERNELS[dtype, dtype], hidden[:0], 0
        else:
            kernel = _KERNELS[dtype, residual.dtype]
            other, stride = _storage(residual), residual.stride(0)
        kernel(hidden, hidden_states.stride(0), other, stride, num_tokens, *arrays)

    return launch


def steer_tokens(hidden_states: Tensor, residual: Tensor | None, *buffers: Any) -> None:
    """`steering.worker.ops.reference.steer_tokens` for float32 and bfloat16 streams."""
    bound(Buffers(*buffers))(hidden_states, residual)


def _storage(stream: Tensor) -> Any:
    """``[(n - 1) * stride + d_in]``: a stream from its first element to its last."""
    if stream.is_contiguous():
        flat = stream.view(-1)
    else:
        assert stream.stride(1) == 1, stream.stride()
        n, d_in = stream.shape
        flat = stream.as_strided(((n - 1) * stream.stride(0) + d_in,), (1,))
    # NumPy has no name for bfloat16, hence its bits.
    return (flat if stream.dtype == torch.float32 else flat.view(torch.uint16)).numpy()
