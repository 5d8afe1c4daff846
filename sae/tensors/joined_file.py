"""Several weight files that are one dictionary: an encoder's and its decoder's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from sae.errors import SAEError
from sae.tensors.tensor_file import TensorFile


class JoinedFile(TensorFile):
    """The tensors of all of the files, safetensors each. Messages name the first one."""

    container = "safetensors"

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self._files = files
        self._by_name: dict[str, TensorFile] = {}
        for file in files:
            for name in file.headers:
                if name in self._by_name:
                    raise SAEError(f"{file.path}: {name} is in {self._by_name[name].path} as well")
                self._by_name[name] = file
        headers = {name: file.headers[name] for name, file in self._by_name.items()}
        super().__init__(files[0].path, headers)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self._files)

    def refuse_changed(self) -> None:
        for file in self._files:
            file.refuse_changed()

    def sha256(self) -> str:
        """SHA-256 of the hexadecimal digests of the files, one after the other, in hexadecimal."""
        digests = "".join(file.sha256() for file in self._files)
        return hashlib.sha256(digests.encode()).hexdigest()

    def tensor(self, name: str) -> Tensor:
        return self._by_name[name].tensor(name)
