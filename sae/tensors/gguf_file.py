"""GGUF, llama.cpp's container: a header of keys and of tensors, then the tensors' bytes, mapped.

Only plain floating-point tensors can be read; a quantized one has its type's number for a dtype.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The package gguf writes the files that this is tested with, and does not read them here, because its
reader trusts them: an array of keys that declares 2**40 elements and holds none kept gguf 0.19 busy
for as long as it was left, at 100 MB more each second, and a file from the hub may say anything.
It also keeps every key, token by token: the header of a 98 MB model takes it 2.4 s and 210 MB, and
this 0.04 s. And it is a dependency of the demo alone, with requests and tqdm behind it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch
from torch import Tensor

from sae.errors import SAEError
from sae.tensors.tensor_file import FLOAT_DTYPES, TensorFile, TensorHeader

MAGIC: Final = b"GGUF"
#: Version 1 had shorter lengths, and went out of use in August 2023.
_VERSIONS: Final = (2, 3)
_ALIGNMENT_KEY: Final = b"general.alignment"
_DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMENSIONS: Final = 4
_MAX_TENSORS: Final = 2**16
_MAX_STRING: Final = 2**16

_STRING, _ARRAY = 8, 9
#: Size in bytes of a value by its type's number; strings and arrays have lengths of their own.
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32: Final = 4
#: By the number of a tensor's type: our word for it, and how its bytes are mapped.
_DTYPES: Final[dict[int, tuple[str, str]]] = {
    0: ("float32", "<f4"),
    1: ("float16", "<f2"),
    28: ("float64", "<f8"),
    30: ("bfloat16", "<i2"),
}


@dataclass(frozen=True)
class _Place:
    """A tensor's shape, its type's number and where it begins behind the header."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFFile(TensorFile):
    """A GGUF file. Its keys are passed over: they tell of a model, and nothing of weights."""

    container = "gguf"

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._places, self._data = _read_header(file)
        except (OSError, ValueError, struct.error, OverflowError) as error:
            raise SAEError(f"{path}: truncated or damaged GGUF file: {error}") from error
        super().__init__(
            path,
            {
                name: TensorHeader(name, _dtype_name(place.kind), place.shape)
                for name, place in self._places.items()
            },
        )
        for name, place in self._places.items():
            if self._end(place) > self.nbytes:
                raise SAEError(f"{path}: truncated: {name} ends past the end of the file")

    def tensor(self, name: str) -> Tensor:
        place = self._places[name]
        dtype, mapped = _DTYPES[place.kind]
        assert dtype in FLOAT_DTYPES
        with self.open_again() as file:
            array = np.memmap(
                file,
                dtype=mapped,
                mode="c",  # never written to; a read-only map cannot become a tensor
                offset=self._data + place.offset,
                shape=place.shape,
            )
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor

    def _end(self, place: _Place) -> int:
        size = np.dtype(_DTYPES[place.kind][1]).itemsize if place.kind in _DTYPES else 0
        return self._data + place.offset + size * math.prod(place.shape)


def _dtype_name(kind: int) -> str:
    return _DTYPES[kind][0] if kind in _DTYPES else f"of GGUF's type {kind}"


def _read_header(file: IO[bytes]) -> tuple[dict[str, _Place], int]:
    """The tensors by name, and where the data begins. Raises ValueError or struct.error."""
    magic, version, num_tensors, num_keys = _unpack(file, "<4sIQQ")
    if magic != MAGIC or version not in _VERSIONS:
        raise ValueError(f"version {version}, expected one of {_VERSIONS}")
    if num_tensors > _MAX_TENSORS:
        raise ValueError(f"{num_tensors} tensors, more than {_MAX_TENSORS}")
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(num_keys):
        key = _string(file)
        (kind,) = _unpack(file, "<I")
        if key == _ALIGNMENT_KEY and kind == _UINT32:
            (alignment,) = _unpack(file, "<I")
        else:
            _skip(file, kind)
    places = dict(_tensors(file, num_tensors))
    if len(places) < num_tensors:
        raise ValueError("two tensors have one name")
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment}, expected a power of two")
    return places, -(-file.tell() // alignment) * alignment


def _tensors(file: IO[bytes], count: int) -> Iterator[tuple[str, _Place]]:
    for _ in range(count):
        name = _string(file).decode()
        (rank,) = _unpack(file, "<I")
        if rank > _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {rank} dimensions, more than {_MAX_DIMENSIONS}")
        # The fastest dimension comes first.
        shape = _unpack(file, f"<{rank}Q")[::-1]
        kind, offset = _unpack(file, "<IQ")
        yield name, _Place(shape, kind, offset)


def _skip(file: IO[bytes], kind: int) -> None:
    """Pass over one value of a type."""
    if kind == _STRING:
        _string(file)
    elif kind == _ARRAY:
        element, count = _unpack(file, "<IQ")
        if element in _SIZES:
            _skip_bytes(file, count * _SIZES[element])
        elif element == _STRING:
            for _ in range(count):
                _string(file)
        else:
            raise ValueError(f"an array of type {element}")
    elif kind in _SIZES:
        _skip_bytes(file, _SIZES[kind])
    else:
        raise ValueError(f"a value of type {kind}")


def _skip_bytes(file: IO[bytes], size: int) -> None:
    # The next read fails if this is past the end.
    file.seek(size, 1)


def _string(file: IO[bytes]) -> bytes:
    (length,) = _unpack(file, "<Q")
    if length > _MAX_STRING:
        # A chat template, say: no name is so long.
        _skip_bytes(file, length)
        return b""
    return _exactly(file, length)


def _unpack(file: IO[bytes], form: str) -> tuple[Any, ...]:
    return struct.unpack(form, _exactly(file, struct.calcsize(form)))


def _exactly(file: IO[bytes], size: int) -> bytes:
    read = file.read(size)
    if len(read) < size:
        raise ValueError("the header ends early")
    return read
