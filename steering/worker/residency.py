"""Where the whole weights of SAEs are when a pass reads all of them.

On an accelerator they must be on the device. By default those of TopK SAEs, which every pass with
an edit of theirs encodes whole, are put there when the model is loaded, before the engine measures
what memory is left for its KV cache. The others take turns in one place of the largest one's size,
with a copy whenever another one's turn comes. If the device is to hold none, requests that need all
of one are refused before they come here (`engine_limits.py`). All this follows from the
configuration and the batches, which the ranks of a tensor-parallel group share, and not from how
much memory is free: weights that lie elsewhere are multiplied by another kernel, whose rounding
would make the ranks differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sae.errors import SAEError
from sae.sae import SAE
from steering.config import RESIDENT_ALL, RESIDENT_NONE, RESIDENT_TURNS


class Residency:
    """Puts the matrices of SAEs on an accelerator.

    Args:
        saes: the SAEs whose layer this worker holds, by index.
        device: where the model runs.
        choice: one of `config.RESIDENT_CHOICES`; None if the model runs on a CPU, so that no
            weights need to be moved.

    Attributes:
        saes: as given. For an SAE's card or one of its vectors, use this without `load`.
        taking_turns: the indices of those SAEs of which one at a time is on the device.

    Raises:
        SAEError: in one line, if the device has no room for the weights.
    """

    def __init__(self, saes: Mapping[int, SAE], device: torch.device, choice: str | None) -> None:
        self.saes = saes
        self._device = device
        self._place: Tensor | None = None
        self._in_place: int | None = None
        kept = set() if choice is None else {i for i in saes if self._is_kept(i, choice)}
        self.taking_turns = frozenset(saes) - kept if choice == RESIDENT_TURNS else frozenset[int]()
        for index in sorted(kept):
            self._keep(index)
        if self.taking_turns:
            self._make_place()

    def whole(self, index: int) -> SAE:
        """An SAE, with its matrices where the whole encode or decode that follows needs them."""
        self.load(index)
        return self.saes[index]

    def is_near(self, index: int) -> bool:
        """Whether `load` would copy nothing."""
        return index not in self.taking_turns or index == self._in_place

    def are_near(self, indices: Iterable[int]) -> bool:
        """Whether `load` would copy nothing for any of these."""
        return all(self.is_near(index) for index in indices)

    def load(self, index: int) -> None:
        """Put an SAE's matrices where the whole encode or decode that follows needs them."""
        if self.is_near(index):
            return
        if self._in_place is not None:
            self.saes[self._in_place].evict(self._device)
        self.saes[index].resident(self._device, self._place)
        self._in_place = index

    def _is_kept(self, index: int, choice: str) -> bool:
        if choice == RESIDENT_TURNS:
            return not self.saes[index].card.exact_from_row
        return choice == RESIDENT_ALL

    def _keep(self, index: int) -> None:
        sae = self.saes[index]
        try:
            sae.resident(self._device)
            sae.prepare(self._device)
        except torch.OutOfMemoryError as error:
            raise self._no_room(f"SAE {sae.card.id!r}", sae.matrix_bytes) from error

    def _make_place(self) -> None:
        size = max(self.saes[index].place_bytes for index in self.taking_turns)
        try:
            self._place = torch.empty(size, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise self._no_room("the largest SAE", size) from error

    def _no_room(self, what: str, size: int) -> SAEError:
        return SAEError(
            f"{self._device}: no room for the {size / 2**30:.2f} GiB of {what} beside the model; "
            f"with --steering-resident {RESIDENT_NONE} weights stay on the host, and requests with "
            "read, error_term false or edits of a TopK SAE are refused"
        )
