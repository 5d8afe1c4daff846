"""Makes of a compiled loop over tokens a function of a stream that costs as little as possible.

Between two hook points a layer's weights go through the caches, so that whatever a call looks at
comes from memory. About twenty arrays, each an object of several cache lines that Numba takes apart
in every call, cost more than eight edits of 32 tokens. So the arrays, which stay where they are,
are written down once, in the form in which compiled code has them, and a call brings seven
integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numba
import numpy as np
import torch
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from steering.worker.ops.buffers import OnStream
from steering.worker.ops.cpu_parts import compiled

#: A kernel by dtype of the hidden states and of the residual; each is compiled when first called.
Kernels: TypeAlias = dict[tuple[torch.dtype, torch.dtype], Callable[..., None]]

#: NumPy has no name for bfloat16, hence its bits.
_STORED: Final = {torch.float32: np.float32, torch.bfloat16: np.uint16}
_MOST_DIMENSIONS: Final = 5
#: The bytes of an array as compiled code has it: five pointers and sizes, two for each dimension.
_MOST_BYTES: Final = 8 * (5 + 2 * _MOST_DIMENSIONS)
_ENTRY: Final = types.void(*(types.int64,) * 7)


@intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """Make a pointer of an address."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _put(typing_context, address, kept):  # type: ignore[no-untyped-def]
    """Write a tuple to an address."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = builder.inttoptr(args[0], args[1].type.as_pointer())
        builder.store(args[1], where, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, kept), generate


def _taker(kept: Any) -> Any:
    """A function that reads a tuple of the type ``kept`` from an address, without references."""

    @intrinsic
    def take(typing_context, address):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            where = builder.inttoptr(args[0], context.get_value_type(kept).as_pointer())
            taken = builder.load(where, align=1)
            for i, member in enumerate(kept.types):
                if isinstance(member, types.Array):
                    array = context.make_array(member)(
                        context, builder, builder.extract_value(taken, i)
                    )
                    # The launch holds the memory, so Numba need not count references to it.
                    array.meminfo = cgutils.get_null_value(array.meminfo.type)
                    array.parent = cgutils.get_null_value(array.parent.type)
                    taken = builder.insert_value(taken, array._getvalue(), i)
            return taken

        return kept(types.int64), generate

    return take


@numba.njit
def _put_down(address, kept):  # type: ignore[no-untyped-def]
    _put(address, kept)


def _entry(kernel: Any, kept: Any, hidden_dtype: torch.dtype, residual_dtype: torch.dtype) -> Any:
    """A kernel compiled as a function of seven integers.

    Args:
        kernel: the loop over tokens.
        kept: the Numba type of what it takes after the stream.
        hidden_dtype: dtype of the hidden states.
        residual_dtype: dtype of the residual.
    """
    stored, residual_stored = _STORED[hidden_dtype], _STORED[residual_dtype]
    take = _taker(kept)

    @compiled
    def enter(  # type: ignore[no-untyped-def]
        hidden_at, hidden_stride, residual_at, residual_stride, num_tokens, d_in, kept_at
    ):  # fmt: skip
        last = num_tokens - 1
        hidden = carray(_pointer(hidden_at), (last * hidden_stride + d_in,), stored)
        length = last * residual_stride + d_in if residual_at != 0 else 0
        residual = carray(_pointer(residual_at), (length,), residual_stored)
        kernel(hidden, hidden_stride, residual, residual_stride, num_tokens, d_in, *take(kept_at))

    enter.compile(_ENTRY)
    return enter.get_overload(_ENTRY)


#: What `_entry` made, by kernel and by type of what it takes after the stream: hook points share
#: them.
_entries: dict[tuple[Any, Any], Any] = {}


def launcher(kernels: Kernels, arrays: tuple[Any, ...]) -> OnStream:
    """A kernel as a function of the stream.

    Args:
        kernels: see `Kernels`.
        arrays: what the kernel takes after the stream; none of it moves.
    """
    assert all(np.ndim(array) <= _MOST_DIMENSIONS for array in arrays)
    kept = numba.typeof(arrays)
    room = np.zeros(len(arrays) * _MOST_BYTES, dtype=np.uint8)
    address = room.ctypes.data
    _put_down(address, arrays)
    found: dict[tuple[torch.dtype, torch.dtype], Any] = {}

    def entry(hidden_dtype: torch.dtype, residual_dtype: torch.dtype) -> Any:
        kernel = kernels[hidden_dtype, residual_dtype]
        if (kernel, kept) not in _entries:
            _entries[kernel, kept] = _entry(kernel, kept, hidden_dtype, residual_dtype)
        found[hidden_dtype, residual_dtype] = _entries[kernel, kept]
        return _entries[kernel, kept]

    # The default argument holds what the address leads to for as long as the function lives.
    def launch(hidden_states: Tensor, residual: Tensor | None, held: Any = (arrays, room)) -> None:
        num_tokens, d_in = hidden_states.shape
        if not num_tokens:
            return
        dtype = other_dtype = hidden_states.dtype
        stride, step = hidden_states.stride()
        assert step == 1 or d_in == 1, hidden_states.stride()
        other, other_stride = 0, 0
        if residual is not None:
            other_dtype, other = residual.dtype, residual.data_ptr()
            other_stride, step = residual.stride()
            assert step == 1 or d_in == 1, residual.stride()
        enter = found.get((dtype, other_dtype)) or entry(dtype, other_dtype)
        enter(hidden_states.data_ptr(), stride, other, other_stride, num_tokens, d_in, address)

    return launch
