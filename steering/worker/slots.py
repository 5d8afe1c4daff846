"""Per-request steering state on the device: a slot per running request, a table per hook point.

This follows vLLM's ``LogitBiasState``: a slot is rewritten as a whole when it is reused, tables
have fixed addresses (CUDA graphs hold them), and writes are copies on the compute stream.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from steering.request.plan import PlannedEdit
from steering.worker.ops.layout import (
    ANY_GATE,
    CARRIED,
    E_COLUMN,
    E_COVERAGE,
    E_END,
    E_FLAGS,
    E_GATES,
    E_OP,
    E_ROW,
    E_START,
    MAX_INTERVENTIONS,
    NUM_EDIT_INTS,
    REREAD,
)


class SlotFacts:
    """What holds for the whole of each slot's request, at every hook point.

    Attributes:
        prompt_len: ``[num_slots]`` int32, tokens in the original prompt.
        max_share: ``[num_slots]`` float32, the largest norm that a token's change at one hook point
            may have, as a share of the stream's norm there; infinite for no limit.
        reports: ``[num_slots]`` int32, nonzero for slots whose activations are recorded.
        reports_np: ``[num_slots]`` bool, the copy of ``reports`` on the host.
        limited_np: ``[num_slots]`` bool, whether ``max_share`` is finite.
    """

    def __init__(self, num_slots: int, device: torch.device | str) -> None:
        self.prompt_len = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.max_share = torch.full((num_slots,), torch.inf, dtype=torch.float32, device=device)
        self.reports = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.reports_np = np.zeros(num_slots, dtype=np.bool_)
        self.limited_np = np.zeros(num_slots, dtype=np.bool_)

    def write(self, slot: int, prompt_len: int, max_share: float | None, reports: bool) -> None:
        """Rewrite a slot as a whole; ``max_share`` is None for no limit."""
        self.prompt_len[slot] = prompt_len
        self.max_share[slot] = torch.inf if max_share is None else max_share
        self.reports[slot] = int(reports)
        self.reports_np[slot] = reports
        self.limited_np[slot] = max_share is not None


class EditTable:
    """The edits of every slot at one hook point.

    Attributes:
        count: ``[num_slots]`` int32, how many edits each slot has.
        ints: ``[num_slots, MAX_INTERVENTIONS, NUM_EDIT_INTS]`` int32; for the columns see `layout`.
        value: ``[num_slots, MAX_INTERVENTIONS]`` float32, the operations' operands.
        count_np: ``[num_slots]`` int32, the copy of ``count`` on the host.
        ints_np: ``[num_slots, MAX_INTERVENTIONS, NUM_EDIT_INTS]`` int32, the copy of ``ints`` on
            the host.
    """

    def __init__(self, num_slots: int, device: torch.device | str) -> None:
        shape = (num_slots, MAX_INTERVENTIONS)
        self.count = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.ints = torch.zeros(*shape, NUM_EDIT_INTS, dtype=torch.int32, device=device)
        self.value = torch.zeros(shape, dtype=torch.float32, device=device)
        # If the device is a CPU, the copies on the host are the same memory.
        self.count_np, self.ints_np, self._value_np = (
            tensor.numpy() if tensor.device.type == "cpu" else tensor.cpu().numpy()
            for tensor in (self.count, self.ints, self.value)
        )

    def write(
        self,
        slot: int,
        edits: Sequence[tuple[int, PlannedEdit]],
        rows: Sequence[int],
        *,
        reread: bool = False,
        carried: Collection[int] = (),
    ) -> None:
        """Rewrite a slot as a whole; an empty list of edits empties it.

        Args:
            slot: the slot to rewrite.
            edits: ``(index in the request, edit)`` of the edits in this table.
            rows: their rows in the pool.
            reread: whether the rows are solved for ``match: "reread"``.
            carried: indices in the request of the edits that were read at another hook point.
        """
        n, had = len(edits), int(self.count_np[slot])
        if not (n or had):
            return
        ints, value = self.ints_np[slot], self._value_np[slot]
        if n:
            flags = REREAD if reread else 0
            ints[:n] = [
                entry_of(row, edit, index, flags | CARRIED if index in carried else flags)
                for (index, edit), row in zip(edits, rows, strict=True)
            ]
            value[:n] = [edit.value for _, edit in edits]
        # What is left of a longer list must cover no token.
        ints[n:had], value[n:had] = 0, 0
        self.count_np[slot] = n
        if self.ints.device.type == "cpu":
            return
        written = max(n, had)
        copy_to_device(self.ints[slot, :written], torch.from_numpy(ints[:written]))
        copy_to_device(self.value[slot, :written], torch.from_numpy(value[:written]))
        self.count[slot] = n


def entry_of(row: int, edit: PlannedEdit, index: int, flags: int) -> list[int]:
    """An edit's columns in the table; ``index`` is the edit's place in its request."""
    entry = [0] * NUM_EDIT_INTS
    entry[E_ROW], entry[E_OP], entry[E_COVERAGE] = row, edit.op, edit.coverage
    entry[E_START], entry[E_END], entry[E_COLUMN] = edit.start, edit.end, index
    entry[E_GATES] = edit.gates | (ANY_GATE if edit.any_gate else 0)
    entry[E_FLAGS] = flags
    return entry


class SlotAllocator:
    """Hands out slots, of which there are as many as the engine may run requests."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def in_use(self) -> int:
        """How many slots are taken."""
        return self.num_slots - len(self._free)

    def take(self) -> int:
        """Take a free slot; the engine runs no more requests than there are slots."""
        assert self._free, f"all {self.num_slots} slots are taken"
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Free a slot."""
        self._free.append(slot)


def to_device(source: Tensor, device: torch.device) -> Tensor:
    """Copy host data to the device in stream order, without waiting for the copy."""
    if device.type != "cuda":
        return source.to(device)
    return source.pin_memory().to(device, non_blocking=True)


def copy_to_device(target: Tensor, source: Tensor) -> None:
    """Copy host data into a device tensor in stream order, without waiting for the copy.

    On CUDA the source is copied to pinned memory first. PyTorch's host allocator does not hand that
    out again before the stream has read it, so later steps cannot overwrite it.
    """
    if target.is_cuda:
        target.copy_(source.pin_memory(), non_blocking=True)
    else:
        target.copy_(source)
