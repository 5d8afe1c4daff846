"""Weight files read without executing anything, told apart by their first bytes."""

from __future__ import annotations

from pathlib import Path

from sae.errors import SAEError
from sae.tensors import gguf_file, npy_file
from sae.tensors.archive import archive_members
from sae.tensors.joined_file import JoinedFile
from sae.tensors.npz_file import NpzFile
from sae.tensors.safetensors_file import SafetensorsFile
from sae.tensors.tensor_file import FLOAT_DTYPES, TensorFile, TensorHeader
from sae.tensors.torch_file import TorchFile

__all__ = ["FLOAT_DTYPES", "JoinedFile", "TensorFile", "TensorHeader", "open_tensors"]


def open_tensors(path: Path) -> TensorFile:
    """Open a weight file at the cost of its header. Raises SAEError if it is damaged or unknown."""
    try:
        with path.open("rb") as file:
            magic = file.read(16)
    except OSError as error:
        raise SAEError(f"{path}: cannot be read: {error.strerror}") from error
    if magic.startswith(gguf_file.MAGIC):
        return gguf_file.GGUFFile(path)
    if magic.startswith(npy_file.MAGIC):
        return npy_file.NpyFile(path)
    if magic[:4] == b"PK\x03\x04":
        return _open_archive(path)
    if magic[8:9] == b"{":
        return SafetensorsFile(path)
    if magic[:1] == b"\x80":
        raise SAEError(
            f"{path}: a bare pickle, which cannot be memory-mapped; save it again with a current "
            "torch.save, or as safetensors"
        )
    raise SAEError(f"{path}: not a known weight file (safetensors, torch, NumPy, GGUF)")


def _open_archive(path: Path) -> TensorFile:
    names = [member.filename for member in archive_members(path)]
    if any(name.endswith(".npy") for name in names):
        return NpzFile(path)
    if any(name.endswith("data.pkl") for name in names):
        return TorchFile(path)
    raise SAEError(f"{path}: an archive without arrays or tensors")
