"""Weight files read without executing anything, told apart by their first bytes."""

from __future__ import annotations

from pathlib import Path

from sae.errors import SAEError
from sae.tensors.safetensors_file import SafetensorsFile
from sae.tensors.tensor_file import FLOAT_DTYPES, TensorFile, TensorHeader

__all__ = ["FLOAT_DTYPES", "TensorFile", "TensorHeader", "open_tensors"]


def open_tensors(path: Path) -> TensorFile:
    """Open a weight file at the cost of its header. SAEError where it is damaged or unknown."""
    try:
        with path.open("rb") as file:
            magic = file.read(16)
    except OSError as error:
        raise SAEError(f"{path}: cannot be read: {error.strerror}") from error
    if magic[8:9] == b"{":
        return SafetensorsFile(path)
    raise SAEError(f"{path}: not a weight file that is known here, expected safetensors")
