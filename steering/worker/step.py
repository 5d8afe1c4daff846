"""One forward pass: the slot, the position and the id of each token of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sae.arrays import IntArray
from steering.worker.ops.layout import NO_SLOT
from steering.worker.slots import copy_to_device


class Step:
    """The batch of the forward pass under way, in tensors at fixed addresses.

    Attributes:
        token_slot: ``[max_num_tokens]`` int32, slot of each token; NO_SLOT for unsteered tokens and
            for everything past the real ones, so padding is never steered.
        positions: ``[max_num_tokens]`` int64, the runner's own buffer.
        input_ids: ``[max_num_tokens]`` int32, the runner's own buffer.
        active: whether any token of this pass has a slot.
        num_tokens: real tokens of this pass.
        slots_np: ``[k]`` int32, the distinct slots with tokens in this pass, ascending.
        first_token_np: ``[k]`` int64, index in the batch of each slot's first token.
        last_token_np: ``[k]`` int64, index in the batch of each slot's last token.
        token_slot_np: ``[num_tokens]`` int32, slot of each token, on the host. It stays the same
            object for as long as the batch stays the same.
    """

    def __init__(
        self, max_num_tokens: int, positions: Tensor, input_ids: Tensor, device: torch.device | str
    ) -> None:
        self.token_slot = torch.full((max_num_tokens,), NO_SLOT, dtype=torch.int32, device=device)
        self.positions = positions
        self.input_ids = input_ids
        self.active = False
        self.num_tokens = 0
        self.slots_np: IntArray = np.empty(0, dtype=np.int32)
        self.first_token_np: IntArray = np.empty(0, dtype=np.int64)
        self.last_token_np: IntArray = np.empty(0, dtype=np.int64)
        self.token_slot_np: IntArray = np.empty(0, dtype=np.int32)
        # How many elements of `token_slot` the last pass left written.
        self._dirty = 0
        # The slots and offsets that it was written for; None if no slot had tokens.
        self._laid_out: tuple[list[int], bytes] | None = None

    def begin(self, slot_of_row: Sequence[int] | IntArray, query_start_loc: IntArray) -> None:
        """Lay out a batch. If it is the last one again, as mostly in decoding, nothing is made.

        Args:
            slot_of_row: slot of each request, in the order of the runner's input batch.
            query_start_loc: ``[num_reqs + 1]`` offsets of the requests' tokens in the batch.
        """
        # Compared without NumPy: since the last pass the model's weights went through the caches,
        # and each NumPy function that is fetched again takes 40 to 90 us.
        slots = slot_of_row.tolist() if isinstance(slot_of_row, np.ndarray) else list(slot_of_row)
        self.num_tokens = int(query_start_loc[-1])
        self.active = any(slot != NO_SLOT for slot in slots)
        if not self.active:
            self._laid_out = None
            self._wipe(0)
            return
        laid_out = slots, query_start_loc.tobytes()
        if laid_out == self._laid_out:
            return
        self._laid_out = laid_out
        self.token_slot_np = np.repeat(np.array(slots, dtype=np.int32), np.diff(query_start_loc))
        slots_np, first_token_np, num_tokens_np = np.unique(
            self.token_slot_np, return_index=True, return_counts=True
        )
        steered = slots_np != NO_SLOT
        self.slots_np, self.first_token_np = slots_np[steered], first_token_np[steered]
        self.last_token_np = self.first_token_np + num_tokens_np[steered] - 1
        copy_to_device(self.token_slot[: self.num_tokens], torch.from_numpy(self.token_slot_np))
        self._wipe(self.num_tokens)

    def end(self, *, wipe: bool = False) -> None:
        """The pass is over: nothing may be steered until the next one is laid out.

        Args:
            wipe: whether to clear the slots on the device as well. A captured graph that is
                replayed for nobody, as data-parallel engines do, reads what the last pass left.
        """
        self.active = False
        self.num_tokens = 0
        if wipe:
            self._laid_out = None
            self._wipe(0)

    def _wipe(self, start: int) -> None:
        if self._dirty > start:
            self.token_slot[start : self._dirty].fill_(NO_SLOT)
        self._dirty = start
