"""What every weight file can do: list its tensors from the header, and map one into memory."""

from __future__ import annotations

import hashlib
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from sae.errors import SAEError

FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's name, dtype and shape as its file declares them; the dtype as a word."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class TensorFile(ABC):
    """A weight file, opened: its headers are read, its tensors are not.

    `container` is what the first bytes say: safetensors, torch, npz, npy or gguf.
    """

    container: ClassVar[str]

    def __init__(self, path: Path, headers: Mapping[str, TensorHeader]) -> None:
        self.path = path
        self.headers = headers
        # Held open: the file may lose its name, or another one may take it.
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._opened = _size_and_time(self._descriptor)

    @property
    def nbytes(self) -> int:
        """The file's size when it was opened."""
        return self._opened[0]

    def refuse_changed(self) -> None:
        """Raises SAEError if the file was written to since it was opened. Costs a microsecond.

        A map shows what is written over it, and reading it past the end of a file that has shrunk
        kills the process. A file that was deleted or replaced by another lives on in the map.
        """
        if _size_and_time(self._descriptor) != self._opened:
            raise SAEError(f"{self.path}: changed on disk after it was opened")

    def open_again(self) -> BufferedReader:
        """The very file that was opened, from its start, whatever its name stands for by now."""
        return open(f"/proc/self/fd/{self._descriptor}", "rb")

    def sha256(self) -> str:
        """SHA-256 of the whole file, in hexadecimal. Raises SAEError if it has changed."""
        with self.open_again() as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.refuse_changed()
        return digest

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor in its stored dtype and layout, memory-mapped if the file allows it."""


def _size_and_time(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
