"""NumPy's npy: one array without a name, memory-mapped."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae.errors import SAEError
from sae.tensors.npz_file import dtype_name, read_npy_header
from sae.tensors.tensor_file import FLOAT_DTYPES, TensorFile, TensorHeader

MAGIC = b"\x93NUMPY"
#: What messages call the array.
NAME = "array"


class NpyFile(TensorFile):
    """One array of `numpy.save`; pickled objects are never read."""

    container = "npy"

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._shape, self._fortran_order, self._dtype = read_npy_header(file)
                self._header_bytes = file.tell()
        # NumPy evaluates a header that is no dictionary into an exception of any kind.
        except Exception as error:
            raise SAEError(f"{path}: damaged npy file: {error}") from error
        super().__init__(path, {NAME: TensorHeader(NAME, dtype_name(self._dtype), self._shape)})
        declared = self._header_bytes + math.prod(self._shape) * self._dtype.itemsize
        if not self._dtype.hasobject and declared != self.nbytes:
            raise SAEError(f"{path}: declares {declared} bytes and holds {self.nbytes}")

    def tensor(self, name: str) -> Tensor:
        assert self.headers[name].dtype in FLOAT_DTYPES
        with self.open_again() as file:
            array = np.memmap(
                file,
                dtype=self._dtype,
                mode="c",  # never written to; a read-only map cannot become a tensor
                offset=self._header_bytes,
                shape=self._shape,
                order="F" if self._fortran_order else "C",
            )
        return torch.from_numpy(array)
