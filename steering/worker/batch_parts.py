"""Lays a batch out at one hook point: which of its tokens have work, and what that work is.

What it makes, and how indices are named, is in `batch_work`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae.arrays import IntArray
from sae.sae import SAE
from steering.request.plan import COVERS_SINKS, COVERS_SPECIAL, PlannedEdit, PlannedGate
from steering.request.probe_plan import PlannedPool, PlannedStream
from steering.worker.batch_work import (
    BatchPart,
    Exact,
    FitTokens,
    FullPart,
    ReadTokens,
    SlotWork,
)
from steering.worker.ops import compilation
from steering.worker.ops.buffers import Buffers
from steering.worker.ops.compiled import Covers
from steering.worker.probed_tokens import (
    kept_tokens,
    pooled_tokens,
)
from steering.worker.residency import Residency
from steering.worker.step import Step
from steering.worker.turns import by_turns

#: How many elements the float32 streams, or the full encodes, of one part of a batch may have.
_WORKSPACE_ELEMENTS = 16 * 2**20
#: Arrays of a full encode's size that a pass holds at once: the encode, edited, and ranked.
_ENCODES_AT_ONCE = 3


@dataclass
class BatchParts:
    """The parts of a batch, each small enough for its intermediates to fit the workspace.

    Tokens that SAEs encode which take turns on the device are apart by these, so that each is
    brought there once a pass; but for a request that needs two of them itself. What fits the
    workspace at once is laid out once, for as long as the batch and its slots stay the same.

    Attributes:
        saes: the SAEs that are read at this hook point, by index.
        buffers: the buffers of this hook point.
        work: slot to its work here.
        residency: which SAEs take turns.
    """

    saes: Mapping[int, SAE]
    buffers: Buffers
    work: Mapping[int, SlotWork]
    residency: Residency
    # Slots by token, and the parts of that batch.
    _laid_out: tuple[IntArray, list[BatchPart]] | None = None

    def forget(self) -> None:
        """A slot was rewritten, so what was laid out may be wrong."""
        self._laid_out = None

    def of(self, step: Step) -> Iterable[BatchPart]:
        """The pass's tokens that have work here; nothing is laid out again without need.

        Of SAEs that take turns, the one that is there comes first.
        """
        if self._laid_out is not None:
            of, parts = self._laid_out
            if of is step.token_slot_np or np.array_equal(of, step.token_slot_np):
                near = self.residency.are_near
                return sorted(parts, key=lambda part: not near(full.sae for full in part.full))
        buffers = self.buffers
        present = [int(s) for s in step.slots_np if int(s) in self.work]
        has_work = np.zeros(buffers.table.count_np.shape[0], dtype=np.bool_)
        has_work[present] = True
        token_np = np.flatnonzero(has_work[step.token_slot_np] & (step.token_slot_np >= 0))
        full = {slot: self.work[slot].full for slot in present}
        chunk = self.tokens_in_part(set[int]().union(*full.values()))
        groups = by_turns(token_np, step.token_slot_np[token_np], full, self.residency)
        if len(token_np) > chunk:
            return (
                self._part(step, group_np[start : start + chunk])
                for group_np in groups
                for start in range(0, len(group_np), chunk)
            )
        parts = [self._part(step, group_np) for group_np in groups]
        self._laid_out = (step.token_slot_np, parts)
        return parts

    def tokens_in_part(self, full: Iterable[int]) -> int:
        """How many tokens a part may have if these SAEs are encoded in full for it."""
        d_in = self.buffers.rows.W_enc.shape[1]
        sizes = [self.saes[s].card.d_sae for s in full]
        # All are encoded before one of them is gone on with.
        encodes = sum(sizes) + (_ENCODES_AT_ONCE - 1) * max(sizes, default=0)
        return max(1, _WORKSPACE_ELEMENTS // max(d_in, encodes))

    def _part(self, step: Step, token_np: IntArray) -> BatchPart:
        buffers = self.buffers
        device = buffers.token_slot.device
        slot_np = step.token_slot_np[token_np]
        first, last = int(token_np[0]), int(token_np[-1])
        dense = last - first + 1 == len(token_np)
        slots = {int(slot): np.flatnonzero(slot_np == slot) for slot in np.unique(slot_np)}
        num_edits = int(buffers.table.count_np[slot_np].max())
        num_reads = int(buffers.reads.count_np[slot_np].max())
        num_gates = int(buffers.gates.count_np[slot_np].max())
        return BatchPart(
            token=slice(first, last + 1) if dense else torch.from_numpy(token_np).to(device),
            edits=compilation.compile_edits(slot_np, token_np, num_edits, buffers)
            if num_edits
            else None,
            reads=compilation.compile_reads(slot_np, token_np, num_reads, buffers)
            if num_reads
            else None,
            gates=compilation.compile_gates(slot_np, token_np, num_gates, buffers)
            if num_gates
            else None,
            full=[
                self._full_part(sae, slots, (num_edits, num_reads, num_gates), device)
                for sae in sorted({sae for slot in slots for sae in self.work[slot].full})
            ],
            replaced=self._replaced(slots, device),
            fits=[
                FitTokens(fit, torch.from_numpy(in_part).to(device), record)
                for slot, in_part in slots.items()
                if (fit := self.work[slot].fit) is not None
                and (record := self.work[slot].record) is not None
            ],
            kept=[
                kept_tokens(
                    *(record, probe, planned, work.edits, work.elsewhere),
                    *(token_np[in_part], in_part, device),
                )
                for slot, in_part in slots.items()
                if (record := (work := self.work[slot]).record) is not None
                for probe, planned in work.probes
                if isinstance(planned, PlannedStream)
            ],
        )

    def _replaced(
        self, slots: Mapping[int, IntArray], device: torch.device
    ) -> list[tuple[int, Tensor]]:
        by_sae: dict[int, list[IntArray]] = {}
        for slot, in_part in slots.items():
            sae = self.work[slot].replaced
            if sae is not None:
                by_sae.setdefault(sae, []).append(in_part)
        return [
            (sae, torch.from_numpy(np.concatenate(parts)).to(device))
            for sae, parts in by_sae.items()
        ]

    def _full_part(
        self,
        sae: int,
        slots: Mapping[int, IntArray],
        widths: tuple[int, int, int],
        device: torch.device,
    ) -> FullPart:
        in_part = {slot: tokens for slot, tokens in slots.items() if sae in self.work[slot].full}
        index_np = np.sort(np.concatenate(list(in_part.values())))
        in_encode = {slot: np.searchsorted(index_np, tokens) for slot, tokens in in_part.items()}
        work = {slot: self.work[slot] for slot in in_part}
        decodes_np = np.zeros(len(index_np), dtype=np.bool_)
        for slot, where in in_encode.items():
            decodes_np[where] = work[slot].decode == sae
        edits = {slot: [edit for _, edit in work[slot].edits] for slot in work}
        elsewhere = {slot: [edit for _, edit in work[slot].elsewhere] for slot in work}
        gates = {slot: [gate for _, gate in work[slot].gates] for slot in work}
        num_edits, num_reads, num_gates = widths
        return FullPart(
            sae,
            torch.from_numpy(index_np).to(device),
            edits=_exact(sae, edits, in_encode, (len(index_np), num_edits), device),
            elsewhere=_exact(sae, elsewhere, in_encode, (len(index_np), num_reads), device),
            gates=_exact(sae, gates, in_encode, (len(index_np), num_gates), device),
            leaves_output=any(sae in slot_work.leaves_output for slot_work in work.values()),
            decodes=torch.from_numpy(decodes_np).to(device) if decodes_np.any() else None,
            reads=self._reads(sae, work, in_part, in_encode, device),
            pools=[
                pooled_tokens(record, probe, planned, in_encode[slot], in_part[slot], device)
                for slot, slot_work in work.items()
                if (record := slot_work.record) is not None
                for probe, planned in slot_work.probes
                if isinstance(planned, PlannedPool) and planned.sae == sae
            ],
        )

    def _reads(
        self,
        sae: int,
        work: Mapping[int, SlotWork],
        in_part: Mapping[int, IntArray],
        in_encode: Mapping[int, IntArray],
        device: torch.device,
    ) -> ReadTokens | None:
        found = [
            (slot, read, record)
            for slot, slot_work in work.items()
            if (read := slot_work.read) is not None
            and read.sae == sae
            and (record := slot_work.record) is not None
        ]
        if not found:
            return None
        lengths = [len(in_part[slot]) for slot, _, _ in found]
        stops = np.cumsum(lengths)

        def column(values: list[int]) -> Tensor:
            return torch.from_numpy(np.repeat(values, lengths)).to(device)[:, None]

        low, high = compilation.window(
            column([read.coverage for _, read, _ in found]),
            column([read.start for _, read, _ in found]),
            column([read.end for _, read, _ in found]),
            column([work[slot].prompt_len for slot, _, _ in found]),
        )
        coverage = column([read.coverage for _, read, _ in found])
        sink_norm = self.saes[sae].card.sink_norm
        return ReadTokens(
            torch.from_numpy(np.concatenate([in_encode[s] for s, _, _ in found])).to(device),
            torch.from_numpy(np.concatenate([in_part[s] for s, _, _ in found])).to(device),
            np.repeat([record.number for _, _, record in found], lengths),
            Covers(
                low,
                high,
                special=coverage & COVERS_SPECIAL != 0,
                sink_norm=None
                if sink_norm is None
                else torch.where(coverage & COVERS_SINKS != 0, torch.inf, sink_norm),
            ),
            top_k=max(0 if read.fit else read.top_k for _, read, _ in found),
            others=[
                (record, read, slice(int(stop) - length, int(stop)))
                for (_, read, record), length, stop in zip(found, lengths, stops, strict=True)
                if read.fit or read.aggregate is not None
            ],
            covers_output=any(
                read.fit and sae in work[slot].leaves_output for slot, read, _ in found
            ),
        )


def _exact(
    sae: int,
    entries: Mapping[int, Sequence[PlannedEdit | PlannedGate]],
    in_encode: Mapping[int, IntArray],
    shape: tuple[int, int],
    device: torch.device,
) -> Exact | None:
    """Which of the entries, by slot, are of an SAE; None if none is."""
    latent_np = np.zeros(shape, dtype=np.int64)
    is_encoded_np = np.zeros(shape, dtype=np.bool_)
    for slot, of_slot in entries.items():
        for column, entry in enumerate(of_slot):
            if entry.sae == sae:
                latent_np[in_encode[slot], column] = entry.latent
                is_encoded_np[in_encode[slot], column] = True
    if not is_encoded_np.any():
        return None
    return Exact(torch.from_numpy(latent_np).to(device), torch.from_numpy(is_encoded_np).to(device))
