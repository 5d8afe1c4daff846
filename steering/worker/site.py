"""One hook point at run time: what sits there, what every slot does there, and what a pass does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sae.sae import SAE
from steering.request.limits import MAX_TOP_K
from steering.request.plan import RowKey, SteeringPlan
from steering.worker import full_path
from steering.worker.batch_parts import BatchParts, SlotWork
from steering.worker.ops.buffers import BoundKernel, Buffers
from steering.worker.pass_reports import PassReports
from steering.worker.probes import strongest
from steering.worker.record import RequestRecord
from steering.worker.residency import Residency
from steering.worker.step import Step


@dataclass
class Site:
    """State of one hook point.

    SAEs read here and edits write here; today every SAE does both at one place, so that the kernel
    is the fusion of the two. What is read here for later hook points, the conditions, has a half of
    its own already.

    Attributes:
        hook: its name.
        saes: index to SAE, those that sit here.
        buffers: what a pass works on.
        kernel: for passes in which rows alone are enough; None where no kernel runs.
        graphs: a CUDA graph holds both halves of the kernel, so both are launched every time.
        work: slot to its work here; slots without any are absent.
    """

    hook: str
    saes: Mapping[int, SAE]
    buffers: Buffers
    residency: Residency
    reports: PassReports
    kernel: BoundKernel | None = None
    graphs: bool = False
    work: dict[int, SlotWork] = field(default_factory=dict)
    _full_slots: set[int] = field(default_factory=set)
    _gated_slots: set[int] = field(default_factory=set)
    _parts: BatchParts = field(init=False)

    def __post_init__(self) -> None:
        self._parts = BatchParts(self.saes, self.buffers, self.work)

    def edits_of(self, plan: SteeringPlan) -> list[int]:
        """The indices of a request's edits that write here."""
        return [i for i, edit in enumerate(plan.edits) if edit.sae in self.saes]

    def set_slot(
        self,
        slot: int,
        plan: SteeringPlan,
        row_of: Mapping[RowKey, int],
        full: frozenset[int],
        record: RequestRecord | None,
    ) -> None:
        """Rewrite a slot whole for a request that starts.

        Args:
            slot: the slot to rewrite.
            plan: the request.
            row_of: where its rows are.
            full: the SAEs, here or elsewhere, that must encode its tokens in full.
            record: what its activations are recorded in, if they are.
        """
        self.clear_slot(slot, rewritten=True)
        here, edit_rows, gate_rows = self.edits_of(plan), plan.edit_rows, plan.gate_rows
        edits = [(i, plan.edits[i]) for i in here]
        gates = [(i, gate) for i, gate in enumerate(plan.gates) if gate.sae in self.saes]
        self.buffers.table.write(
            slot, edits, [row_of[edit_rows[i]] for i in here], reread=plan.reread
        )
        self.buffers.gates.write(slot, gates, [row_of[gate_rows[i]] for i, _ in gates])
        full &= self.saes.keys()
        read = plan.read if plan.read is not None and plan.read.sae in self.saes else None
        probes = [(i, probe) for i, probe in enumerate(plan.probes) if probe.sae in self.saes]
        if edits or gates or full or probes:
            decode = None if plan.error_term or not edits else edits[0][1].sae
            self.work[slot] = SlotWork(
                edits, gates, full, decode, read, plan.prompt_len, record, probes
            )
        if full or probes:
            self._full_slots.add(slot)
        if gates:
            self._gated_slots.add(slot)

    def clear_slot(self, slot: int, *, rewritten: bool = False) -> None:
        """Empty a slot whose request left the batch.

        Args:
            slot: the slot to empty.
            rewritten: its entries in the tables are written over in any case.
        """
        self._parts.forget()
        if not rewritten:
            self.buffers.table.write(slot, [], [])
            self.buffers.gates.write(slot, [], [])
        self.work.pop(slot, None)
        self._full_slots.discard(slot)
        self._gated_slots.discard(slot)

    def encode_no_more(self, slot: int) -> None:
        """None of the slot's tokens needs a full encode from here on."""
        if slot in self._full_slots:
            self._parts.forget()
            self._full_slots.discard(slot)
            self.work[slot] = replace(
                self.work[slot], full=frozenset(), decode=None, read=None, probes=()
            )

    def runs_in_torch(self, slots: Iterable[int]) -> bool:
        """Whether this pass has a whole encode, so that it must run outside CUDA graphs."""
        return bool(self._full_slots) and any(int(slot) in self._full_slots for slot in slots)

    def apply(self, hidden_states: Tensor, residual: Tensor | None, step: Step) -> None:
        """Edit the batch in place.

        The kernel, where there is one, serves every pass in which each edit needs its own row only;
        a pass with a full encode runs in torch, outside CUDA graphs.

        Args:
            hidden_states: ``[num_tokens, d_in]`` model dtype; rows of uncovered tokens stay as
                they are, bit for bit.
            residual: the same shape, or None; only read.
            step: the pass under way.
        """
        if self.kernel is None or (step.active and self.runs_in_torch(step.slots_np)):
            for part in self._parts.of(step):
                full_path.apply(
                    hidden_states, residual, part, self.residency, self.buffers, self.reports
                )
            return
        if self.graphs or self._reads_gates(step):
            self.kernel.read_gates(hidden_states, residual)
        self.kernel.steer(hidden_states, residual)

    @torch.inference_mode()
    def rehearse(self, sae: int, hidden_states: Tensor) -> None:
        """Take the memory that one part of a full pass takes, and give it back; nothing is edited.

        Args:
            sae: one of those here.
            hidden_states: ``[num_tokens, d_in]`` model dtype, of the largest pass.
        """
        x = hidden_states[: self._parts.tokens_in_part([sae])].float()
        f = self.residency.whole(sae).encode(x)
        strongest(f, MAX_TOP_K)
        self.residency.whole(sae).decode(f, x)

    def compile_kernel(self, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Run both halves of the kernel on a stream in which no token has a slot."""
        if self.kernel is not None:
            self.kernel.read_gates(hidden_states, residual)
            self.kernel.steer(hidden_states, residual)

    def _reads_gates(self, step: Step) -> bool:
        return bool(self._gated_slots) and any(int(s) in self._gated_slots for s in step.slots_np)
