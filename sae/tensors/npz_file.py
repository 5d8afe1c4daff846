"""NumPy's npz: a zip of arrays. Those stored as they are get memory-mapped inside the archive;
compressed ones are read whole on first use."""

from __future__ import annotations

import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from sae.errors import SAEError
from sae.tensors.tensor_file import FLOAT_DTYPES, TensorFile, TensorHeader

# Weights barely compress. A small array may; a larger one that grows more than this is a bomb.
FREE_BYTES = 64 * 2**20
MAX_RATIO = 64

_npy = cast(Any, np.lib.format)  # its functions are untyped
_LOCAL_HEADER = struct.Struct("<26xHH")  # the lengths of the name and of the extra field


@dataclass(frozen=True)
class _Member:
    """An array of the archive: its zip entry, dtype and order, and where its numbers start."""

    entry: zipfile.ZipInfo
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    fortran_order: bool
    header_bytes: int


class NpzFile(TensorFile):
    """An npz archive; pickled objects in it are never read."""

    container = "npz"

    def __init__(self, path: Path) -> None:
        self._members: dict[str, _Member] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    name = entry.filename.removesuffix(".npy")
                    if name in self._members:
                        raise SAEError(f"{path}: {name} is stored twice")
                    self._members[name] = _read_member(path, archive, entry)
        except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError) as error:
            if isinstance(error, SAEError):
                raise
            raise SAEError(f"{path}: truncated or damaged archive: {error}") from error
        # zlib and zipfile have exceptions of their own, and pass others on.
        except Exception as error:
            raise SAEError(f"{path}: damaged archive: {type(error).__name__}: {error}") from error
        super().__init__(
            path,
            {
                name: TensorHeader(name, dtype_name(member.dtype), member.shape)
                for name, member in self._members.items()
            },
        )

    def tensor(self, name: str) -> Tensor:
        member = self._members[name]
        assert self.headers[name].dtype in FLOAT_DTYPES
        if member.entry.compress_type == zipfile.ZIP_STORED:
            return torch.from_numpy(self._mapped(member))
        try:
            with (
                self.open_again() as whole,
                zipfile.ZipFile(whole) as archive,
                archive.open(member.entry) as file,
            ):
                return torch.from_numpy(_npy.read_array(file, allow_pickle=False))
        except Exception as error:
            raise SAEError(f"{self.path}: {name} cannot be decompressed: {error}") from error

    def _mapped(self, member: _Member) -> np.memmap[tuple[int, ...], np.dtype[np.generic]]:
        with self.open_again() as file:
            file.seek(member.entry.header_offset)
            name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            data = member.entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            try:
                return np.memmap(
                    file,
                    dtype=member.dtype,
                    mode="c",  # never written to; a read-only map cannot become a tensor
                    offset=data + member.header_bytes,
                    shape=member.shape,
                    order="F" if member.fortran_order else "C",
                )
            except ValueError as error:
                raise SAEError(f"{self.path}: {member.entry.filename} is truncated") from error


def _read_member(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Member:
    """Read one array's header, and compare the size it declares with what the archive declares."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SAEError(f"{path}: {entry.filename} is compressed in an unknown way")
    if entry.flag_bits & 1:
        raise SAEError(f"{path}: {entry.filename} is encrypted")
    if entry.file_size > max(FREE_BYTES, MAX_RATIO * entry.compress_size):
        raise SAEError(
            f"{path}: {entry.filename} grows from {entry.compress_size} to {entry.file_size} "
            f"bytes, more than {MAX_RATIO} times"
        )
    with archive.open(entry) as file:
        shape, fortran_order, dtype = read_npy_header(file)
        header_bytes = file.tell()
    declared = header_bytes + math.prod(shape) * dtype.itemsize
    # Objects are pickled: they have no declared size, and are refused by their dtype.
    if not dtype.hasobject and declared != entry.file_size:
        raise SAEError(
            f"{path}: {entry.filename} declares {declared} bytes and holds {entry.file_size}"
        )
    return _Member(entry, dtype, shape, fortran_order, header_bytes)


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether in Fortran's order, and dtype; the file then stands at the numbers.

    Raises ValueError if this is no header of an npy file.
    """
    version = _npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version}, expected 1.0 or 2.0")
    read = _npy.read_array_header_1_0 if version == (1, 0) else _npy.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return shape, fortran_order, dtype


def dtype_name(dtype: np.dtype[np.generic]) -> str:
    """The dtype as `TensorHeader` has it."""
    return dtype.name if dtype.isnative and not dtype.hasobject else str(dtype)
