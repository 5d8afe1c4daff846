"""A batch at one hook point, laid out: which of its tokens have work, and what that work is.

Indices are named by what they count in: ``in_batch``, the pass's tokens; ``in_part``, those of one
part, which all have work; ``in_encode``, those of a part for which one SAE is encoded in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae.arrays import IntArray
from sae.sae import SAE
from steering.request.plan import (
    COVERS_SINKS,
    COVERS_SPECIAL,
    PlannedEdit,
    PlannedGate,
    PlannedRead,
)
from steering.request.probe_plan import PlannedPool, PlannedProbe, PlannedStream
from steering.worker.ops import compilation
from steering.worker.ops.buffers import Buffers
from steering.worker.ops.compiled import CompiledEdits, CompiledGates, CompiledReads, Covers
from steering.worker.probed_tokens import (
    KeptTokens,
    PooledTokens,
    kept_tokens,
    pooled_tokens,
)
from steering.worker.record import RequestRecord
from steering.worker.residency import Residency
from steering.worker.step import Step
from steering.worker.turns import by_turns

#: Elements that the float32 streams, or the full encodes, of one part of a batch may take.
_WORKSPACE_ELEMENTS = 16 * 2**20
#: Arrays as large as a full encode that a pass holds at once: it, the edited one, the ranked one.
_ENCODES_AT_ONCE = 3


@dataclass(frozen=True)
class SlotWork:
    """What one slot does at one hook point, beyond its entries in the tables.

    Attributes:
        edits: ``(index in the request, edit)`` that are added at this hook point.
        gates: ``(index in the request, gate)`` that are read at this hook point.
        full: SAEs that must be encoded in full for this slot's tokens.
        decode: the SAE whose reconstruction replaces the stream (``error_term: false``).
        read: what is read at this hook point.
        prompt_len: tokens of the request's original prompt.
        record: where what is read goes; None if nothing is recorded.
        elsewhere: ``(index in the request, edit)`` that are read here and added elsewhere.
        leaves_output: SAEs that are read here and whose reconstruction is needed elsewhere.
        replaced: the SAE, read elsewhere, whose reconstruction replaces the stream.
        fit: the SAE, read elsewhere, whose reconstruction is held against the stream.
        probes: ``(index in the request, probe)`` of those at this hook point.
    """

    edits: list[tuple[int, PlannedEdit]]
    gates: list[tuple[int, PlannedGate]]
    full: frozenset[int]
    decode: int | None
    read: PlannedRead | None
    prompt_len: int
    record: RequestRecord | None
    elsewhere: Sequence[tuple[int, PlannedEdit]] = ()
    leaves_output: frozenset[int] = frozenset()
    replaced: int | None = None
    fit: int | None = None
    probes: Sequence[tuple[int, PlannedProbe]] = ()

    @property
    def in_torch(self) -> bool:
        """Whether a pass over this slot's tokens runs in torch here."""
        return bool(self.full or self.probes) or self.replaced is not None or self.fit is not None


@dataclass(frozen=True)
class Exact:
    """Entries whose activations are taken from a full encode; all ``[m, e]``.

    Attributes:
        latent: int64.
        own: bool, the entry is at the SAE that is encoded.
    """

    latent: Tensor
    own: Tensor


@dataclass(frozen=True)
class ReadTokens:
    """The tokens of a full encode that are read, of all requests together.

    Attributes:
        in_encode: ``[r]`` int64.
        in_part: ``[r]`` int64.
        record_np: ``[r]`` the record of each, by number.
        covers: ``[r, 1]`` what the reads cover.
        top_k: the most that one of them asks for; 0 if all ask for something else.
        others: probes of whole encodes, each with its tokens among these.
        covers_output: whether what is covered is to be known where the SAE writes.
    """

    in_encode: Tensor
    in_part: Tensor
    record_np: IntArray
    covers: Covers
    top_k: int
    others: list[tuple[RequestRecord, PlannedRead, slice]]
    covers_output: bool


@dataclass(frozen=True)
class FitTokens:
    """Tokens of a part where a request compares an SAE's reconstruction with the stream.

    Attributes:
        sae: the SAE, which was read elsewhere.
        index: ``[m]`` int64, where they are in the part.
        record: of the request.
    """

    sae: int
    index: Tensor
    record: RequestRecord


@dataclass(frozen=True)
class FullPart:
    """The tokens of a part for which one SAE is encoded in full.

    Attributes:
        index: ``[m]`` int64, where they are in the part.
        edits: None if none is added here at this SAE.
        elsewhere: None if none is added elsewhere at this SAE.
        gates: None if none has any at this SAE.
        leaves_output: the reconstruction is needed where the SAE writes.
        decodes: ``[m]`` bool, the reconstruction replaces the stream; None if of none.
        reads: None if none is read.
        pools: tokens whose activations are summed up.
    """

    sae: int
    index: Tensor
    edits: Exact | None
    elsewhere: Exact | None
    gates: Exact | None
    leaves_output: bool
    decodes: Tensor | None
    reads: ReadTokens | None
    pools: list[PooledTokens]


@dataclass(frozen=True)
class BatchPart:
    """Tokens that have work here, and that work: all that lasts from pass to pass.

    Attributes:
        token: their index in the batch, a slice if they are neighbours.
        edits: None if no slot among them has any.
        reads: of edits that are added elsewhere; None if no slot among them has any.
        gates: None if no slot among them has any here.
        replaced: ``(SAE, [m] int64 index in the part)`` of tokens whose stream becomes what an SAE
            that was read elsewhere makes of them.
        fits: tokens that are compared with that.
        kept: tokens whose stream is kept behind the edits.
    """

    token: slice | Tensor
    edits: CompiledEdits | None
    reads: CompiledReads | None
    gates: CompiledGates | None
    full: list[FullPart]
    replaced: list[tuple[int, Tensor]]
    fits: list[FitTokens]
    kept: list[KeptTokens]


@dataclass
class BatchParts:
    """Parts of a batch whose intermediates fit the workspace.

    Tokens that SAEs encode which take turns on the device are apart by these, so that each is
    brought there once a pass; but for a request that needs two of them itself. What fits the
    workspace at once is laid out once, for as long as the batch and its slots stay the same.

    Attributes:
        saes: index to SAE, those at this hook point.
        buffers: of this hook point.
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
        """A slot is rewritten: what was laid out may be wrong."""
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
        """Most tokens of a part in which these SAEs are encoded in full."""
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
                    *(token_np[here], here, device),
                )
                for slot, here in slots.items()
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
        in_part = {slot: here for slot, here in slots.items() if sae in self.work[slot].full}
        index_np = np.sort(np.concatenate(list(in_part.values())))
        in_encode = {slot: np.searchsorted(index_np, here) for slot, here in in_part.items()}
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
            leaves_output=any(sae in of_slot.leaves_output for of_slot in work.values()),
            decodes=torch.from_numpy(decodes_np).to(device) if decodes_np.any() else None,
            reads=self._reads(sae, work, in_part, in_encode, device),
            pools=[
                pooled_tokens(record, probe, planned, in_encode[slot], in_part[slot], device)
                for slot, one in work.items()
                if (record := one.record) is not None
                for probe, planned in one.probes
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
            (slot, one.read, one.record)
            for slot, one in work.items()
            if one.read is not None and one.read.sae == sae and one.record is not None
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
    latent_np = np.zeros(shape, dtype=np.int64)
    own_np = np.zeros(shape, dtype=np.bool_)
    for slot, of_slot in entries.items():
        for column, entry in enumerate(of_slot):
            if entry.sae == sae:
                latent_np[in_encode[slot], column] = entry.latent
                own_np[in_encode[slot], column] = True
    if not own_np.any():
        return None
    return Exact(torch.from_numpy(latent_np).to(device), torch.from_numpy(own_np).to(device))
