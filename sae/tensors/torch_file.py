"""PyTorch's zip format: a pickle of tensors, read without executing anything, memory-mapped."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sae.errors import SAEError
from sae.tensors.archive import archive_members
from sae.tensors.tensor_file import TensorFile, TensorHeader

MAX_PICKLE_BYTES = 16 * 2**20
#: What messages call a tensor that was saved alone.
NAME = "tensor"


class TorchFile(TensorFile):
    """A file of `torch.save`: named dense tensors, or one alone; other values are ignored."""

    container = "torch"

    def __init__(self, path: Path) -> None:
        _check_archive(path)
        try:
            with warnings.catch_warnings(), path.open("rb") as file:
                # Warnings are about pickles of unusual versions, which are read or refused below.
                warnings.simplefilter("ignore")
                # weights_only: a restricted unpickler that builds tensors and containers alone.
                # The name has no suffix: torch.load would go by it, not by the content.
                content = torch.load(
                    f"/proc/self/fd/{file.fileno()}",
                    map_location="cpu",
                    weights_only=True,
                    mmap=True,
                )
        # A damaged pickle can fail in any way that Python knows.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SAEError(f"{path}: not readable as tensors alone: {reason:.200}") from error
        if isinstance(content, Tensor):
            content = {NAME: content}
        if not isinstance(content, Mapping):
            raise SAEError(f"{path}: holds {type(content).__name__}, expected named tensors")
        self._tensors = {
            name: value.detach()
            for name, value in content.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        for name, tensor in self._tensors.items():
            _check_dense(path, name, tensor)
        super().__init__(
            path,
            {
                name: TensorHeader(name, str(tensor.dtype).removeprefix("torch."), (*tensor.shape,))
                for name, tensor in self._tensors.items()
            },
        )

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _check_archive(path: Path) -> None:
    """A memory map needs members as they are; a compressed one would be read as numbers."""
    for member in archive_members(path):
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise SAEError(f"{path}: {member.filename} is compressed, as torch.save never does")
        if member.filename.endswith("data.pkl") and member.file_size > MAX_PICKLE_BYTES:
            raise SAEError(
                f"{path}: its pickle has {member.file_size} bytes, more than {MAX_PICKLE_BYTES}"
            )


def _check_dense(path: Path, name: str, tensor: Tensor) -> None:
    """A view that repeats its storage declares more numbers than the file holds."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise SAEError(f"{path}: {name} is not a dense tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise SAEError(f"{path}: {name} is {list(tensor.shape)}, more than its storage holds")
