"""Per-request steering state on the device: one slot a running request, one table a hook point.

After vLLM's ``LogitBiasState``: a slot is rewritten whole when it is reused, tables have fixed
addresses (CUDA graphs hold them), and writes are copies on the compute stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from steering.request.limits import MAX_INTERVENTIONS
from steering.request.plan import PlannedEdit

NO_SLOT: Final = -1

# Columns of `EditTable.ints`.
E_ROW, E_OP, E_COVERAGE, E_START, E_END = range(5)
NUM_INTS: Final = 5


class EditTable:
    """The edits of every slot at one hook point.

    Attributes:
        count: ``[num_slots]`` int32, edits of each slot.
        ints: ``[num_slots, MAX_INTERVENTIONS, NUM_INTS]`` int32.
        value: ``[num_slots, MAX_INTERVENTIONS]`` float32, the operations' operands.
        count_np: ``[num_slots]`` int32, host twin of ``count``.
        rows_np: ``[num_slots, MAX_INTERVENTIONS]`` int32, host twin of the row column.
    """

    def __init__(self, num_slots: int, device: torch.device | str) -> None:
        shape = (num_slots, MAX_INTERVENTIONS)
        self.count = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.ints = torch.zeros(*shape, NUM_INTS, dtype=torch.int32, device=device)
        self.value = torch.zeros(shape, dtype=torch.float32, device=device)
        self.count_np = np.zeros(num_slots, dtype=np.int32)
        self.rows_np = np.zeros(shape, dtype=np.int32)

    def write(self, slot: int, edits: Sequence[PlannedEdit], rows: Sequence[int]) -> None:
        """Rewrite a slot whole; no edits empty it.

        Args:
            slot: the slot to rewrite.
            edits: the request's edits at this hook point.
            rows: their rows in the pool.
        """
        ints = np.zeros((MAX_INTERVENTIONS, NUM_INTS), dtype=np.int32)
        value = np.zeros(MAX_INTERVENTIONS, dtype=np.float32)
        for i, (edit, row) in enumerate(zip(edits, rows, strict=True)):
            ints[i] = (row, edit.op, edit.coverage, edit.start, edit.end)
            value[i] = edit.value
        had = self.count_np[slot]
        self.count_np[slot] = len(edits)
        self.rows_np[slot] = ints[:, E_ROW]
        if edits or had:
            copy_to_device(self.ints[slot], torch.from_numpy(ints))
            copy_to_device(self.value[slot], torch.from_numpy(value))
            self.count[slot] = len(edits)


class SlotAllocator:
    """Which slots are taken. There are as many as the engine may run requests."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def in_use(self) -> int:
        """Slots taken now."""
        return self.num_slots - len(self._free)

    def take(self) -> int:
        """A free slot; the engine runs no more requests than there are slots."""
        assert self._free, f"all {self.num_slots} slots are taken"
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Free a slot."""
        self._free.append(slot)


def to_device(source: Tensor, device: torch.device) -> Tensor:
    """Host data on the device, in stream order, without waiting for it."""
    if device.type != "cuda":
        return source.to(device)
    return source.pin_memory().to(device, non_blocking=True)


def copy_to_device(target: Tensor, source: Tensor) -> None:
    """Copy host data in stream order, without waiting for it.

    On CUDA the source is copied to pinned memory first, which PyTorch's host allocator does not
    hand out again before the stream has read it: later steps cannot overtake.
    """
    if target.is_cuda:
        target.copy_(source.pin_memory(), non_blocking=True)
    else:
        target.copy_(source)
