"""What every weight file can do: list its tensors from the header, and map one into memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's name, dtype and shape as its file declares them; the dtype as a word."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class TensorFile(ABC):
    """A weight file, opened: its headers are read, its tensors are not.

    `container` is what the first bytes say: safetensors, torch or npz.
    """

    container: ClassVar[str]

    def __init__(self, path: Path, headers: Mapping[str, TensorHeader]) -> None:
        self.path = path
        self.headers = headers

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor in its stored dtype and layout, memory-mapped where the file allows it."""
