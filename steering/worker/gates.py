"""Conditions on the device: where each is read, and what is known of it so far.

A condition is read at its own hook point, before the edits there, and decides about edits there
and at later ones. It has an event at a token where its feature exceeds the threshold. An event is a
bit of its token, and the first position with an event is kept for each slot. Whether the condition
holds at a token follows from these two, by its scope and sense:

    token, above:   an event at this token         below: no event, though there could be one
    so far, above:  first <= position              below: first > position
    prompt, above:  first < length of the prompt   below: first >= length of the prompt

There can be no event at special tokens, the first token and sinks. The answer never depends on how
a sequence was cut into passes: what a pass will compute again (the tail of a rejected speculation,
a chunk after preemption) is forgotten before the pass, but for what a prompt decides
(`GateState.begin`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steering.request.plan import PlannedGate
from steering.worker.ops.layout import (
    KIND_SCOPE,
    MAX_GATES,
    NEVER,
    NUM_GATE_INTS,
    SCOPE_SO_FAR,
    SCOPE_STOP,
)
from steering.worker.slots import copy_to_device

#: Scopes whose first event is forgotten before a pass over its position, which finds it again. With
#: scope `prompt` it stays: after a preemption one pass may compute the prompt and generated tokens,
#: and must know before what the prompt decided.
_FOUND_ANEW = (SCOPE_SO_FAR, SCOPE_STOP)


class GateTable:
    """The conditions of every slot that are read at one hook point.

    Attributes:
        count: ``[num_slots]`` int32, how many conditions each slot has.
        ints: ``[num_slots, MAX_GATES, NUM_GATE_INTS]`` int32; for the columns see `layout`.
        threshold: ``[num_slots, MAX_GATES]`` float32, in raw units.
        count_np: ``[num_slots]`` int32, the copy of ``count`` on the host.
        ints_np: ``[num_slots, MAX_GATES, NUM_GATE_INTS]`` int32, the copy of ``ints`` on the host.
    """

    def __init__(self, num_slots: int, device: torch.device | str) -> None:
        shape = (num_slots, MAX_GATES)
        self.count = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.ints = torch.zeros(*shape, NUM_GATE_INTS, dtype=torch.int32, device=device)
        self.threshold = torch.zeros(shape, dtype=torch.float32, device=device)
        self.count_np = np.zeros(num_slots, dtype=np.int32)
        self.ints_np = np.zeros((*shape, NUM_GATE_INTS), dtype=np.int32)

    def write(
        self, slot: int, gates: Sequence[tuple[int, PlannedGate]], rows: Sequence[int]
    ) -> None:
        """Rewrite a slot as a whole; an empty list of gates empties it.

        Args:
            slot: the slot to rewrite.
            gates: ``(index in the request, gate)`` of the conditions that are read here.
            rows: their rows in the pool.
        """
        if not (gates or self.count_np[slot]):
            return
        ints = np.zeros((MAX_GATES, NUM_GATE_INTS), dtype=np.int32)
        threshold = np.zeros(MAX_GATES, dtype=np.float32)
        for i, ((index, gate), row) in enumerate(zip(gates, rows, strict=True)):
            ints[i, :3] = row, index, gate.scope
            threshold[i] = gate.threshold
        self.count_np[slot] = len(gates)
        self.ints_np[slot] = ints
        copy_to_device(self.ints[slot], torch.from_numpy(ints))
        copy_to_device(self.threshold[slot], torch.from_numpy(threshold))
        self.count[slot] = len(gates)


class GateState:
    """What is known of every slot's conditions, shared by all hook points.

    Attributes:
        kind: ``[num_slots, MAX_GATES]`` int32, scope and sense of each gate; see `layout`.
        first_held: ``[num_slots, MAX_GATES]`` int32, the first position with an event, NEVER if
            there is none; not kept with SCOPE_TOKEN.
        events: ``[max_num_tokens]`` int32, bits of this pass's tokens; see `layout.QUIET`.
    """

    def __init__(self, num_slots: int, max_num_tokens: int, device: torch.device | str) -> None:
        shape = (num_slots, MAX_GATES)
        self.kind = torch.zeros(shape, dtype=torch.int32, device=device)
        self.first_held = torch.full(shape, NEVER, dtype=torch.int32, device=device)
        self.events = torch.zeros(max_num_tokens, dtype=torch.int32, device=device)
        self._found_anew = torch.zeros(shape, dtype=torch.bool, device=device)
        self._written: set[int] = set()  # slots that have gates, as they were written last

    def write(self, slot: int, gates: Sequence[PlannedGate], first_held: Tensor | None) -> None:
        """Rewrite a slot as a whole.

        Args:
            slot: the slot to rewrite.
            gates: all conditions of the request.
            first_held: ``[MAX_GATES]`` what `saved` returned when the request was preempted; None
                for a new request.
        """
        if not gates and slot not in self._written:
            return
        if gates:
            self._written.add(slot)
        else:
            self._written.discard(slot)
        kind = np.zeros(MAX_GATES, dtype=np.int32)
        for i, gate in enumerate(gates):
            kind[i] = gate.scope * KIND_SCOPE + gate.sense
        copy_to_device(self.kind[slot], torch.from_numpy(kind))
        anew = np.isin(kind // KIND_SCOPE, _FOUND_ANEW)
        copy_to_device(self._found_anew[slot], torch.from_numpy(anew))
        if first_held is None:
            self.first_held[slot].fill_(NEVER)
        else:
            self.first_held[slot].copy_(first_held)

    def saved(self, slot: int) -> Tensor:
        """A copy ``[MAX_GATES]`` of a slot's first events, which later passes do not change."""
        return self.first_held[slot].clone()

    def begin(self, slots: Tensor, first_token: Tensor, positions: Tensor, num_tokens: int) -> None:
        """Forget what this pass will find again.

        This is decided on the device, from the runner's own positions: the host does not know how
        far a request has come if its last pass was speculative.

        Args:
            slots: ``[k]`` int64, the distinct slots of this pass that have gates.
            first_token: ``[k]`` int64, index in the batch of each slot's first token.
            positions: ``[max_num_tokens]`` int64.
            num_tokens: tokens of this pass.
        """
        self.events[:num_tokens].zero_()
        first = self.first_held[slots]
        anew = self._found_anew[slots] & (first >= positions[first_token][:, None])
        self.first_held[slots] = first.masked_fill(anew, NEVER)
