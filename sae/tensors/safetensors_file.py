"""safetensors: a JSON header, then the tensors' bytes. Always memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.errors import SAEError
from sae.tensors.tensor_file import TensorFile, TensorHeader

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class SafetensorsFile(TensorFile):
    """A safetensors file; the library checks that the header covers the file exactly."""

    container = "safetensors"

    def __init__(self, path: Path) -> None:
        try:
            self._file = cast(Any, safe_open(str(path), framework="pt"))  # its stubs are untyped
            headers = {name: self._header(name) for name in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise SAEError(f"{path}: truncated or damaged safetensors file: {error}") from error
        super().__init__(path, headers)

    def _header(self, name: str) -> TensorHeader:
        declared = self._file.get_slice(name)
        dtype = str(declared.get_dtype())
        return TensorHeader(name, _DTYPES.get(dtype, dtype.lower()), tuple(declared.get_shape()))

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor
