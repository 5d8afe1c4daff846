"""Slots with conditions in the pass under way, and which requests one of them ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae.arrays import BoolArray, IntArray
from steering.request.plan import PlannedGate
from steering.worker.gates import GateState
from steering.worker.ops.layout import FIRST_GATE_COLUMN, MAX_GATES, NEVER, SCOPE_STOP
from steering.worker.slots import to_device
from steering.worker.step import Step


@dataclass(frozen=True)
class Stops:
    """What became of ``stop_when`` in one pass, in tensors on the device.

    They are the pass's own, not buffers: a copy to the host may be started beside that of the
    sampled tokens and read when that is.

    Attributes:
        req_ids: the requests of the pass that have a ``stop_when``, k of them.
        position: ``[k]`` int64, the first position of this pass at which one fired; NEVER for none.
        gate: ``[k]`` int64, which of the plan's gates; of several at one token the first.
        activation: ``[k]`` float32, its f there; arbitrary where none fired.
    """

    req_ids: list[str]
    position: Tensor
    gate: Tensor
    activation: Tensor


@dataclass(frozen=True)
class _Batch:
    """Slots with gates in one pass, as tensors.

    Attributes:
        slots: ``[k]`` int64.
        first_token: ``[k]`` int64, index in the batch of each one's first token.
    """

    slots: Tensor
    first_token: Tensor


class GatedSlots:
    """Which slots have conditions, and those of the pass under way.

    Attributes:
        in_pass: whether any slot of the pass has.
    """

    def __init__(self, num_slots: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._gated_np = np.zeros(num_slots, dtype=np.bool_)
        self._stop_np = np.zeros((num_slots, MAX_GATES), dtype=np.bool_)
        self._req_id: dict[int, str] = {}
        self.in_pass = False
        self._stopping: tuple[list[str], _Batch, Tensor] | None = None
        # Slots by token of the last pass, with what was worked out for them.
        self._laid_out: tuple[IntArray, _Batch, tuple[list[str], _Batch, Tensor] | None] | None
        self._laid_out = None

    def write(self, slot: int, req_id: str, gates: Sequence[PlannedGate]) -> None:
        """Rewrite a slot; no gates empty it."""
        self._laid_out = None
        self._gated_np[slot] = bool(gates)
        self._stop_np[slot] = False
        for i, gate in enumerate(gates):
            self._stop_np[slot, i] = gate.scope == SCOPE_STOP
        self._req_id[slot] = req_id

    def begin(self, step: Step, state: GateState) -> None:
        """A pass is laid out: have what it finds anew forgotten."""
        self.in_pass = step.active and bool(self._gated_np[step.slots_np].any())
        self._stopping = None
        if not self.in_pass:
            return
        if self._laid_out is None or self._laid_out[0] is not step.token_slot_np:
            stops_np = np.asarray(self._stop_np[step.slots_np].any(axis=1))
            stopping = None
            if stops_np.any():
                slots_np = step.slots_np[stops_np]
                stopping = (
                    [self._req_id[int(slot)] for slot in slots_np],
                    self._batch(step, stops_np),
                    to_device(torch.from_numpy(self._stop_np[slots_np]), self._device),
                )
            gated_np: BoolArray = self._gated_np[step.slots_np]
            gated = self._batch(step, gated_np)
            self._laid_out = step.token_slot_np, gated, stopping
        _, gated, self._stopping = self._laid_out
        state.begin(gated.slots, gated.first_token, step.positions, step.num_tokens)

    def stops(self, positions: Tensor, state: GateState, f: Tensor) -> Stops | None:
        """As `SteeringState.stops`.

        Args:
            positions: ``[max_num_tokens]`` int64.
            state: of all slots.
            f: ``[max_num_tokens, MAX_ENTRIES]`` float32, the pass's activations.
        """
        if self._stopping is None:
            return None
        req_ids, batch, is_stop = self._stopping
        start = positions[batch.first_token]
        first = state.first_held[batch.slots].long()
        # An earlier pass's event has ended the request already, if it was to be.
        first = first.masked_fill(~is_stop | (first < start[:, None]), NEVER)
        # The first position, and there the first gate, as one number.
        ranked = (first * MAX_GATES + torch.arange(MAX_GATES, device=first.device)).amin(dim=1)
        position, gate = ranked // MAX_GATES, ranked % MAX_GATES
        fired = position != NEVER
        token = torch.where(fired, batch.first_token + position - start, batch.first_token)
        return Stops(req_ids, position, gate, f[token, FIRST_GATE_COLUMN + gate])

    def _batch(self, step: Step, of_slot: BoolArray) -> _Batch:
        return _Batch(
            to_device(torch.from_numpy(step.slots_np[of_slot].astype(np.int64)), self._device),
            to_device(
                torch.from_numpy(step.first_token_np[of_slot].astype(np.int64)), self._device
            ),
        )
