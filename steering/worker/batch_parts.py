"""A batch at one hook point, laid out: which of its tokens have work, and what that work is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae.arrays import IntArray
from sae.sae import SAE
from steering.request.plan import PlannedEdit, SteeringPlan
from steering.worker.ops import batched
from steering.worker.ops.batched import CompiledEdits
from steering.worker.record import RequestRecord
from steering.worker.rows import RowPool
from steering.worker.slots import EditTable
from steering.worker.step import Step

#: Elements that the float32 streams, or the full encodes, of one part of a batch may take.
_WORKSPACE_ELEMENTS = 16 * 2**20


@dataclass
class SlotWork:
    """What one slot does at one hook point, beyond its edits' table.

    Attributes:
        edits: ``(index in the request, edit)`` at this hook point.
        full: SAEs that must be encoded in full for this slot's tokens.
        decode: the SAE whose reconstruction replaces the stream (``error_term: false``).
        plan: the request.
        record: where results go; None if nothing is recorded.
    """

    edits: list[tuple[int, PlannedEdit]]
    full: frozenset[int]
    decode: int | None
    plan: SteeringPlan
    record: RequestRecord | None


@dataclass(frozen=True)
class SlotTokens:
    """The tokens of one slot among those of a full encode.

    Attributes:
        columns: ``(column of the slot's edits, edit)`` at the SAE that is encoded.
        local: ``[m]`` int64, where they are in the encode.
        here: ``[m]`` int64, where they are in the part.
    """

    work: SlotWork
    columns: list[tuple[int, PlannedEdit]]
    local: Tensor
    here: Tensor


@dataclass(frozen=True)
class FullPart:
    """The tokens of a part for which one SAE is encoded in full.

    Attributes:
        index: ``[m]`` int64, where they are in the part.
        latent: ``[m, e]`` int64, latents of their edits; None if none has any at this SAE.
        own: ``[m, e]`` bool, which edits are at this SAE.
        groups: the same tokens by slot.
    """

    sae: int
    index: Tensor
    latent: Tensor | None
    own: Tensor
    groups: list[SlotTokens]


@dataclass(frozen=True)
class BatchPart:
    """Tokens that have work here, and that work: all that lasts from pass to pass.

    Attributes:
        token: their index in the batch, a slice where they are neighbours.
        edits: None if no slot among them has any.
        reports: work, record and rows in the part of each slot that reports.
    """

    token: slice | Tensor
    edits: CompiledEdits | None
    full: list[FullPart]
    reports: list[tuple[SlotWork, RequestRecord, IntArray]]


@dataclass
class BatchParts:
    """Parts of a batch whose intermediates fit the workspace.

    A batch of one part is laid out once, for as long as it and its slots stay the same.

    Attributes:
        saes: index to SAE, those at this hook point.
        work: slot to its work here.
        prompt_len: ``[num_slots]`` int32.
    """

    saes: Mapping[int, SAE]
    rows: RowPool
    table: EditTable
    prompt_len: Tensor
    work: Mapping[int, SlotWork]
    # Slots by token, and the only part of that batch, None if it has no work.
    _laid_out: tuple[IntArray, BatchPart | None] | None = None

    def forget(self) -> None:
        """A slot is rewritten: what was laid out may be wrong."""
        self._laid_out = None

    def of(self, step: Step) -> Iterable[BatchPart]:
        """The pass's tokens that have work here; nothing is laid out again without need."""
        if self._laid_out is not None:
            of, part = self._laid_out
            if of is step.token_slot_np or np.array_equal(of, step.token_slot_np):
                return () if part is None else (part,)
        present = [int(s) for s in step.slots_np if int(s) in self.work]
        has_work = np.zeros(self.table.count_np.shape[0], dtype=np.bool_)
        has_work[present] = True
        token_np = np.flatnonzero(has_work[step.token_slot_np] & (step.token_slot_np >= 0))
        full = {sae for s in present for sae in self.work[s].full}
        width = int(self.table.count_np[present].max()) if present else 0
        chunk = self.tokens_in_part(full)
        if len(token_np) > chunk:
            return (
                self._part(step, token_np[start : start + chunk], width)
                for start in range(0, len(token_np), chunk)
            )
        part = self._part(step, token_np, width) if len(token_np) else None
        self._laid_out = (step.token_slot_np, part)
        return () if part is None else (part,)

    def tokens_in_part(self, full: Iterable[int]) -> int:
        """Most tokens of a part in which these SAEs are encoded in full."""
        per_token = max([self.rows.W_enc.shape[1], *(2 * self.saes[s].card.d_sae for s in full)])
        return max(1, _WORKSPACE_ELEMENTS // per_token)

    def _part(self, step: Step, token_np: IntArray, width: int) -> BatchPart:
        device = self.prompt_len.device
        slot_np = step.token_slot_np[token_np]
        first, last = int(token_np[0]), int(token_np[-1])
        dense = last - first + 1 == len(token_np)
        slots = {int(slot): np.flatnonzero(slot_np == slot) for slot in np.unique(slot_np)}
        edits = None
        if width:
            edits = batched.compile_edits(slot_np, width, self.table, self.rows, self.prompt_len)
        return BatchPart(
            token=slice(first, last + 1) if dense else torch.from_numpy(token_np).to(device),
            edits=edits,
            full=[
                self._full_part(sae, slots, width, device)
                for sae in sorted({sae for slot in slots for sae in self.work[slot].full})
            ],
            reports=[
                (work, record, here)
                for slot, here in slots.items()
                if (record := (work := self.work[slot]).record) is not None
                and work.plan.report
                and work.edits
            ],
        )

    def _full_part(
        self, sae: int, slots: Mapping[int, IntArray], width: int, device: torch.device
    ) -> FullPart:
        members = {slot: here for slot, here in slots.items() if sae in self.work[slot].full}
        index_np = np.sort(np.concatenate(list(members.values())))
        latent_np = np.zeros((len(index_np), width), dtype=np.int64)
        own_np = np.zeros((len(index_np), width), dtype=np.bool_)
        groups = []
        for slot, here in members.items():
            local = np.searchsorted(index_np, here)
            columns = [
                (column, edit)
                for column, (_, edit) in enumerate(self.work[slot].edits)
                if edit.sae == sae
            ]
            for column, edit in columns:
                latent_np[local, column] = edit.latent
                own_np[local, column] = True
            groups.append(
                SlotTokens(
                    self.work[slot],
                    columns,
                    torch.from_numpy(local).to(device),
                    torch.from_numpy(here).to(device),
                )
            )
        return FullPart(
            sae,
            torch.from_numpy(index_np).to(device),
            torch.from_numpy(latent_np).to(device) if own_np.any() else None,
            torch.from_numpy(own_np).to(device),
            groups,
        )
