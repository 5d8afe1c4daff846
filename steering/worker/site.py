"""One hook point at run time: its SAEs, what each slot does there, and what a pass does there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from sae.arrays import IntArray
from sae.card import KINDS_THAT_DECODE
from sae.sae import SAE
from steering.request.limits import MAX_TOP_K
from steering.request.plan import PlannedEdit, PlannedGate, RowKey, SteeringPlan
from steering.worker import full_path
from steering.worker.batch_parts import BatchParts
from steering.worker.batch_work import SlotWork
from steering.worker.ops.buffers import BoundKernel, Buffers, OnStream
from steering.worker.pass_reports import PassReports
from steering.worker.probes import strongest
from steering.worker.record import RequestRecord
from steering.worker.residency import Residency
from steering.worker.step import Step
from steering.worker.whole_outputs import WholeOutputs

#: Parts of the kernel, in order; None if the pass, or every pass, runs in torch.
_Launches: TypeAlias = tuple[OnStream, ...] | None


class SharedHeads(Protocol):
    """A stream of which each tensor-parallel rank holds some elements of every token."""

    @property
    def ranks(self) -> int: ...

    def gathered(self, part: Tensor) -> Tensor:
        """The whole stream ``[num_tokens, d]``, in new memory.

        Args:
            part: ``[num_tokens, d / ranks]``, what this rank holds.
        """
        ...

    def part_of(self, whole: Tensor) -> Tensor:
        """This rank's part ``[num_tokens, d / ranks]`` of what `gathered` returned."""
        ...


@dataclass
class Site:
    """State of one hook point.

    SAEs read here, and edits are added here. If an SAE does both at this place, the kernel's
    `steer` does both at once. If it reads here and writes elsewhere, `read_edits` reads its edits
    and leaves in `Buffers.carried` what `steer` adds there.

    Attributes:
        hook: the name of the hook point.
        saes: the SAEs that read here, by index.
        written: the SAEs whose edits are added here, by index.
        buffers: what a pass works on.
        residency: where the whole weights of ``saes`` are.
        reports: takes what a full pass finds, on its way to the records.
        outputs: what SAEs that write elsewhere make of whole tokens.
        kernel: serves the passes in which rows alone are enough; None if no kernel runs.
        graphs: whether a CUDA graph holds all of the kernel, so that all of it is launched in every
            pass.
        heads: how tensor-parallel ranks share the stream here; None if every rank has all of it.
        work: slot to its work here; slots without any are absent.
    """

    hook: str
    saes: Mapping[int, SAE]
    written: Mapping[int, SAE]
    buffers: Buffers
    residency: Residency
    reports: PassReports
    outputs: WholeOutputs
    kernel: BoundKernel | None = None
    graphs: bool = False
    heads: SharedHeads | None = None
    work: dict[int, SlotWork] = field(default_factory=dict)
    _full_slots: set[int] = field(default_factory=set)
    _parts: BatchParts = field(init=False)
    _chosen: tuple[IntArray, _Launches] | None = None

    def __post_init__(self) -> None:
        self._parts = BatchParts(self.saes, self.buffers, self.work, self.residency)

    @cached_property
    def width(self) -> int:
        """How many elements of a token's stream this worker holds here."""
        width = self.buffers.rows.W_enc.shape[1]
        return width if self.heads is None else width // self.heads.ranks

    def edits_of(self, plan: SteeringPlan) -> list[int]:
        """The indices in the request of the edits that are added here."""
        return [i for i, edit in enumerate(plan.edits) if edit.sae in self.written]

    def set_slot(
        self,
        slot: int,
        plan: SteeringPlan,
        row_of: Mapping[RowKey, int],
        full: frozenset[int],
        record: RequestRecord | None,
    ) -> None:
        """Rewrite a slot as a whole for a request that enters the batch.

        Args:
            slot: the slot to rewrite.
            plan: what the request asks for.
            row_of: the place of each of its rows in the pool.
            full: the SAEs, here or elsewhere, that must encode its tokens in full.
            record: where its activations are recorded; None if they are not.
        """
        self.clear_slot(slot)
        buffers, edit_rows, gate_rows = self.buffers, plan.edit_rows, plan.gate_rows
        edits = [(i, plan.edits[i]) for i in self.edits_of(plan)]
        elsewhere = [
            (i, edit) for i, edit in enumerate(plan.edits) if edit.sae in self._read_for_elsewhere
        ]
        gates = [(i, gate) for i, gate in enumerate(plan.gates) if gate.sae in self.saes]
        work = self._work(plan, edits, elsewhere, gates, full, record)
        if not (work.edits or work.elsewhere or work.gates or work.in_torch):
            return
        self._forget_passes()
        self.work[slot] = work
        if work.in_torch:
            self._full_slots.add(slot)
        carried = {i for i, edit in edits if edit.sae in self._write_of}
        buffers.table.write(
            slot,
            edits,
            [row_of[edit_rows[i].of_write(self._write_of.get(edit.sae, 0))] for i, edit in edits],
            reread=plan.reread,
            carried=carried,
        )
        buffers.reads.write(slot, elsewhere, [row_of[edit_rows[i]] for i, _ in elsewhere])
        buffers.gates.write(slot, gates, [row_of[gate_rows[i]] for i, _ in gates])

    @cached_property
    def _write_of(self) -> dict[int, int]:
        """For each SAE that is read elsewhere, which of the places where it writes this one is."""
        return {
            index: sae.card.writes.index(self.hook)
            for index, sae in self.written.items()
            if not sae.card.one_place
        }

    @cached_property
    def _read_for_elsewhere(self) -> frozenset[int]:
        """The SAEs that read here and write elsewhere."""
        return frozenset(index for index, sae in self.saes.items() if not sae.card.one_place)

    def _work(
        self,
        plan: SteeringPlan,
        edits: list[tuple[int, PlannedEdit]],
        elsewhere: list[tuple[int, PlannedEdit]],
        gates: list[tuple[int, PlannedGate]],
        full: frozenset[int],
        record: RequestRecord | None,
    ) -> SlotWork:
        read = plan.read if plan.read is not None and plan.read.sae in self.saes else None
        decode, replaced, fit = None, None, None
        leaves: set[int] = set()
        if not plan.error_term:
            for _, edit in edits:
                if self.written[edit.sae].card.one_place:
                    decode = edit.sae
                else:
                    replaced = edit.sae
            leaves.update(edit.sae for _, edit in elsewhere)
        if plan.read is not None and plan.read.fit:
            if read is not None and _decodes_elsewhere(self.saes[read.sae]):
                leaves.add(read.sae)
            sae = self.written.get(plan.read.sae)
            if sae is not None and _decodes_elsewhere(sae):
                fit = plan.read.sae
        return SlotWork(
            edits=edits,
            gates=gates,
            full=full & self.saes.keys(),
            decode=decode,
            read=read,
            prompt_len=plan.prompt_len,
            record=record,
            elsewhere=elsewhere,
            leaves_output=frozenset(leaves),
            replaced=replaced,
            fit=fit,
            probes=[(i, probe) for i, probe in enumerate(plan.probes) if probe.sae in self.saes],
        )

    def clear_slot(self, slot: int) -> None:
        """Empty a slot whose request left the batch."""
        if self.work.pop(slot, None) is None:
            return
        self._forget_passes()
        self.buffers.table.write(slot, [], [])
        self.buffers.reads.write(slot, [], [])
        self.buffers.gates.write(slot, [], [])
        self._full_slots.discard(slot)

    def _forget_passes(self) -> None:
        """Drop what was worked out for the last pass, which no longer holds."""
        self._parts.forget()
        self._chosen = None

    def encode_no_more(self, slot: int) -> None:
        """From now on none of the slot's tokens needs a full encode."""
        if slot in self._full_slots:
            self._forget_passes()
            self._full_slots.discard(slot)
            self.work[slot] = replace(
                self.work[slot],
                full=frozenset(),
                decode=None,
                read=None,
                leaves_output=frozenset(),
                replaced=None,
                fit=None,
                probes=(),
            )

    def runs_in_torch(self, slots: Iterable[int]) -> bool:
        """Whether a pass over these slots runs in torch here, and so outside CUDA graphs."""
        return bool(self._full_slots) and any(int(slot) in self._full_slots for slot in slots)

    def apply(self, hidden_states: Tensor, residual: Tensor | None, step: Step) -> None:
        """Read what is read here, and edit the batch in place.

        The kernel, if there is one, serves every pass in which each edit needs only its own row; a
        pass with a full encode runs in torch, outside CUDA graphs.

        Args:
            hidden_states: ``[num_tokens, d_in]`` model dtype; rows of uncovered tokens stay as
                they are, bit for bit.
            residual: the same shape, or None; only read.
            step: the pass under way.
        """
        if self.heads is not None:
            assert residual is None, self.hook
            if not self.works(step):
                return  # the same on all ranks
            whole = self.heads.gathered(hidden_states)
            self._apply(whole, None, step)
            hidden_states.copy_(self.heads.part_of(whole))
        else:
            self._apply(hidden_states, residual, step)

    def _apply(self, hidden_states: Tensor, residual: Tensor | None, step: Step) -> None:
        launches = self._launches(step)
        if launches is None:
            for part in self._parts.of(step):
                full_path.apply(
                    hidden_states,
                    residual,
                    part,
                    self.residency,
                    self.buffers,
                    self.reports,
                    self.outputs,
                )
            return
        for launch in launches:
            launch(hidden_states, residual)

    def works(self, step: Step) -> bool:
        """Whether a pass reads or writes anything here; always True if graphs hold the op."""
        launches = self._launches(step)
        if launches is None:
            return any(int(slot) in self.work for slot in step.slots_np)
        return bool(launches)

    def _launches(self, step: Step) -> _Launches:
        """The parts of the kernel that a pass needs, found out once for each batch."""
        if not step.active:
            return self._of_kernel(None)
        if self._chosen is None or self._chosen[0] is not step.slots_np:
            in_torch = self.runs_in_torch(step.slots_np)
            self._chosen = step.slots_np, None if in_torch else self._of_kernel(step.slots_np)
        return self._chosen[1]

    def _of_kernel(self, slots_np: IntArray | None) -> _Launches:
        """The parts of the kernel for which some slot has entries.

        All of them if graphs hold the op or ``slots_np`` is None, but never those that no served
        SAE could need.
        """
        if self.kernel is None:
            return None
        buffers, every = self.buffers, self.graphs or slots_np is None
        parts = (
            (bool(self.saes), buffers.gates.count_np, self.kernel.read_gates),
            (bool(self._read_for_elsewhere), buffers.reads.count_np, self.kernel.read_edits),
            (bool(self.written), buffers.table.count_np, self.kernel.steer),
        )
        return tuple(
            launch
            for served, count_np, launch in parts
            if served and (every or count_np[slots_np].any())
        )

    @torch.inference_mode()
    def rehearse(self, sae: int, hidden_states: Tensor) -> None:
        """Take the memory that one part of a full pass takes, and give it back; nothing is edited.

        Args:
            sae: index of one of the SAEs that read here.
            hidden_states: ``[num_tokens, d_in]`` model dtype, of the largest pass.
        """
        whole = hidden_states if self.heads is None else self.heads.gathered(hidden_states)
        x = whole[: self._parts.tokens_in_part([sae])].float()
        f = self.residency.whole(sae).encode(x)
        strongest(f, MAX_TOP_K)
        card = self.saes[sae].card
        if _decodes_elsewhere(self.saes[sae]):
            self.outputs.leave(sae, len(hidden_states), card.d_out, x.device)
        if card.error_term:
            self.residency.whole(sae).decode(f, x)
        self.outputs.forget()

    def compile_kernel(self, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Run every part of the kernel once on a stream in which no token has a slot."""
        for launch in self._of_kernel(None) or ():
            launch(hidden_states, residual)


def _decodes_elsewhere(sae: SAE) -> bool:
    """Whether it writes elsewhere and its reconstruction is known as soon as it has been read."""
    return not sae.card.one_place and sae.card.kind in KINDS_THAT_DECODE
