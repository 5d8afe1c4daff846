"""Whether an SAE's whole weights are kept on the device, for the passes that read all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch

from sae.sae import SAE

#: Most of the free memory that one SAE may take; its copy passes through twice its size.
MOST_OF_FREE: Final = 0.5


class Residency:
    """Puts the matrices of SAEs on an accelerator when a request first needs all of them.

    Without it a full pass copies them from the memory map in chunks, every time.

    Args:
        saes: index to SAE.
        device: where the model runs.
        free_bytes: memory that nobody holds on the device now; None where weights in the host's
            memory are as near as they can be.
    """

    def __init__(
        self,
        saes: Mapping[int, SAE],
        device: torch.device,
        free_bytes: Callable[[], int] | None,
    ) -> None:
        self._saes = saes
        self._device = device
        self._free_bytes = free_bytes
        self._decided: set[int] = set()

    def bring(self, index: int) -> None:
        """Make an SAE resident if there is room; what is decided the first time stays so."""
        if self._free_bytes is None or index in self._decided:
            return
        self._decided.add(index)
        sae = self._saes[index]
        if sae.matrix_bytes <= MOST_OF_FREE * self._free_bytes():
            sae.resident(self._device)
