"""Slots with conditions in the pass under way, and the requests that a ``stop_when`` ends."""

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

    Only each request's last token is judged: every earlier token was judged when it was the last.
    If earlier tokens are computed again after a preemption, a difference in rounding must neither
    take back what was answered since nor hide that the last token fulfils a condition.

    The tensors belong to this pass and are not reused. Their copy to the host may be started beside
    that of the sampled tokens, and read together with it.

    Attributes:
        req_ids: the requests of the pass that have a ``stop_when``, k of them.
        position: ``[k]`` int64, position of the last token if a ``stop_when`` fired there, else
            NEVER.
        gate: ``[k]`` int64, index of the plan's gate that fired, the first if several did.
        activation: ``[k]`` float32, the feature's activation there; arbitrary if none fired.
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
        token: ``[k]`` int64, index in the batch of one token of each slot.
    """

    slots: Tensor
    token: Tensor


class GatedSlots:
    """Which slots have conditions, and which of them are in the pass under way.

    Attributes:
        in_pass: whether any slot of the pass has conditions.
    """

    def __init__(self, num_slots: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._gated: set[int] = set()
        self._stop_np = np.zeros((num_slots, MAX_GATES), dtype=np.bool_)
        self._req_id: dict[int, str] = {}
        self.in_pass = False
        self._stopping: tuple[list[str], _Batch, Tensor] | None = None
        # The slot of each token of the last pass, with what was worked out for them.
        self._laid_out: tuple[IntArray, _Batch, tuple[list[str], _Batch, Tensor] | None] | None
        self._laid_out = None

    def write(self, slot: int, req_id: str, gates: Sequence[PlannedGate]) -> None:
        """Rewrite a slot; an empty list of gates empties it."""
        self._laid_out = None
        if gates:
            self._gated.add(slot)
        else:
            self._gated.discard(slot)
        self._stop_np[slot] = False
        for i, gate in enumerate(gates):
            self._stop_np[slot, i] = gate.scope == SCOPE_STOP
        self._req_id[slot] = req_id

    def begin(self, step: Step, state: GateState) -> None:
        """A pass is laid out: have what it will find again forgotten; see `GateState.begin`."""
        self.in_pass = step.active and bool(self._gated) and bool(self._of(step).any())
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
                    self._batch(step, stops_np, step.last_token_np),
                    to_device(torch.from_numpy(self._stop_np[slots_np]), self._device),
                )
            gated = self._batch(step, self._of(step), step.first_token_np)
            self._laid_out = step.token_slot_np, gated, stopping
        _, gated, self._stopping = self._laid_out
        state.begin(gated.slots, gated.token, step.positions, step.num_tokens)

    def _of(self, step: Step) -> BoolArray:
        """Which of the slots of a pass have conditions."""
        return np.array([int(slot) in self._gated for slot in step.slots_np], dtype=np.bool_)

    def stops(self, positions: Tensor, state: GateState, f: Tensor) -> Stops | None:
        """See `SteeringState.stops`.

        Args:
            positions: ``[max_num_tokens]`` int64.
            state: what is known of all slots' conditions.
            f: ``[max_num_tokens, MAX_ENTRIES]`` float32, the pass's activations.
        """
        if self._stopping is None:
            return None
        (req_ids, batch, is_stop), self._stopping = self._stopping, None
        events = state.events[batch.token, None]
        gates = torch.arange(MAX_GATES, dtype=torch.int32, device=events.device)
        gate = gates.masked_fill(~is_stop | (events >> gates & 1 == 0), MAX_GATES).amin(dim=1)
        position = positions[batch.token].masked_fill(gate == MAX_GATES, NEVER)
        gate = gate.clamp(max=MAX_GATES - 1).long()
        return Stops(req_ids, position, gate, f[batch.token, FIRST_GATE_COLUMN + gate])

    def _batch(self, step: Step, of_slot: BoolArray, token_np: IntArray) -> _Batch:
        return _Batch(
            to_device(torch.from_numpy(step.slots_np[of_slot].astype(np.int64)), self._device),
            to_device(torch.from_numpy(token_np[of_slot].astype(np.int64)), self._device),
        )
