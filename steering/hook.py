"""One hook point at run time: the SAEs that sit there, their edits, and what a pass does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sae.sae import SAE
from steering.kernel_reports import KernelReports, ReportPart
from steering.ops import batched
from steering.ops.batched import Coverage, Stream
from steering.plan import COVERS_SINKS, OP_ADD, PlannedEdit, SteeringPlan
from steering.records import FloatArray, IntArray, RequestRecord
from steering.rows import RowPool
from steering.slots import EditTable
from steering.step import Step

#: Elements that one gathered block of rows, or of full encodes, may take.
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


@dataclass
class Counters:
    """Running totals of one worker, for metrics."""

    edited_tokens: int = 0
    skipped_tokens: int = 0
    op_seconds: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class KernelPath:
    """The kernel and its buffers at fixed addresses, of one hook point.

    Attributes:
        launch: ``triton_kernel.steer_tokens``.
        report_f: ``[max_num_tokens, MAX_INTERVENTIONS]`` float32, activations before the edit.
        reports: ``[num_slots]`` int32, whether a slot's activations are wanted.
        touched: ``[2]`` int64, tokens edited and tokens kept off by a sink, since the last look.
    """

    launch: Callable[..., None]
    report_f: Tensor
    reports: Tensor
    touched: Tensor


@dataclass
class HookRuntime:
    """State of one hook point.

    Attributes:
        saes: index to SAE, those that sit here.
        table: every slot's edits here.
        work: slot to its work here; slots without any are absent.
    """

    saes: Mapping[int, SAE]
    rows: RowPool
    table: EditTable
    is_special: Tensor  # [vocab_size] bool
    prompt_len: Tensor  # [num_slots] int32
    counters: Counters
    kernel: KernelPath | None = None
    work: dict[int, SlotWork] = field(default_factory=dict)
    _full_slots: set[int] = field(default_factory=set)

    def set_slot(
        self,
        slot: int,
        plan: SteeringPlan,
        row_of: Mapping[tuple[int, int], int],
        record: RequestRecord | None,
    ) -> None:
        """Rewrite a slot whole for a request that starts."""
        edits = [(i, edit) for i, edit in enumerate(plan.edits) if edit.sae in self.saes]
        self.table.write(
            slot,
            [edit for _, edit in edits],
            [row_of[edit.sae, edit.latent] for _, edit in edits],
        )
        decode = None if plan.error_term or not edits else edits[0][1].sae
        full = {
            edit.sae
            for _, edit in edits
            if not self.saes[edit.sae].card.exact_from_row and (edit.op != OP_ADD or plan.report)
        }
        if decode is not None:
            full.add(decode)
        reads = plan.read is not None and plan.read.sae in self.saes
        if plan.read is not None and reads:
            full.add(plan.read.sae)
        self.work.pop(slot, None)
        self._full_slots.discard(slot)
        if edits or reads:
            self.work[slot] = SlotWork(edits, frozenset(full), decode, plan, record)
        if full:
            self._full_slots.add(slot)
        if self.kernel is not None:
            self.kernel.reports[slot] = record is not None and plan.report and bool(edits)

    def clear_slot(self, slot: int) -> None:
        """Empty a slot whose request left the batch."""
        self.table.write(slot, [], [])
        self.work.pop(slot, None)
        self._full_slots.discard(slot)

    def needs_full(self, slots: Iterable[int]) -> bool:
        """Whether this pass must run outside CUDA graphs: some slot needs a full encode."""
        return bool(self._full_slots) and any(int(slot) in self._full_slots for slot in slots)

    @torch.inference_mode()
    def apply(self, hidden_states: Tensor, residual: Tensor | None, step: Step) -> None:
        """Edit the batch in place.

        The kernel serves every pass in which each edit needs its own row only; a pass with a full
        encode runs in torch, outside CUDA graphs.

        Args:
            hidden_states: ``[num_tokens, d_in]`` model dtype; rows of uncovered tokens stay as
                they are, bit for bit.
            residual: the same shape, or None; only read.
            step: the pass under way.
        """
        if self.kernel is not None and not (step.active and self.needs_full(step.slots_np)):
            num_tokens = hidden_states.shape[0]
            self.kernel.launch(
                hidden_states,
                residual,
                step.token_slot[:num_tokens],
                step.positions,
                step.input_ids,
                self.is_special,
                self.prompt_len,
                self.table,
                self.rows,
                self.kernel.report_f,
                self.kernel.reports,
                self.kernel.touched,
            )
            return
        present = [int(s) for s in step.slots_np if int(s) in self.work]
        if not present:
            return
        has_work = np.zeros(self.table.count_np.shape[0], dtype=np.bool_)
        has_work[present] = True
        token_np = np.flatnonzero(has_work[step.token_slot_np] & (step.token_slot_np >= 0))
        width = int(self.table.count_np[present].max())
        distinct_np = np.unique(
            np.concatenate([self.table.rows_np[s, : self.table.count_np[s]] for s in present])
        )
        device = hidden_states.device
        distinct = torch.from_numpy(distinct_np).to(device)
        full = {sae for s in present for sae in self.work[s].full}
        chunk = self._chunk(hidden_states.shape[1], width, len(distinct_np), full)
        for start in range(0, len(token_np), chunk):
            part = token_np[start : start + chunk]
            slot_np = step.token_slot_np[part]
            stream = batched.gather_stream(
                hidden_states,
                residual,
                torch.from_numpy(part).to(device),
                torch.from_numpy(slot_np).long().to(device),
                step.positions,
                step.input_ids,
                self.is_special,
                self.prompt_len,
            )
            self._apply_chunk(hidden_states, stream, slot_np, width, distinct, full)

    def collect(self, step: Step, reports: KernelReports) -> None:
        """After a pass in the kernel: start copying what reporting requests asked for."""
        if self.kernel is None or self.needs_full(step.slots_np):
            return
        parts = []
        tokens: list[IntArray] = []
        taken = 0
        for slot in step.slots_np:
            work = self.work.get(int(slot))
            if work is None or work.record is None or not work.plan.report or not work.edits:
                continue
            token = np.flatnonzero(step.token_slot_np == slot)
            where = np.arange(taken, taken + len(token))
            parts.append(ReportPart(work.record, [i for i, _ in work.edits], where))
            tokens.append(token)
            taken += len(token)
        if parts:
            index = torch.from_numpy(np.concatenate(tokens)).to(step.positions.device)
            width = max(len(part.columns) for part in parts)
            reports.copy(step.positions[index], self.kernel.report_f[index, :width], parts)

    def _chunk(self, d_in: int, width: int, num_rows: int, full: set[int]) -> int:
        """Tokens at a time such that no intermediate exceeds the workspace."""
        dense = batched.dense_pays(num_rows, width)
        per_token = max(d_in, num_rows) if dense else width * d_in
        per_token = max([per_token, *(2 * self.saes[sae].card.d_sae for sae in full)])
        return max(1, _WORKSPACE_ELEMENTS // per_token)

    def _apply_chunk(
        self,
        hidden_states: Tensor,
        stream: Stream,
        slot_np: IntArray,
        width: int,
        distinct: Tensor,
        full: set[int],
    ) -> None:
        delta = None
        touched = None
        encoded = self._encode(stream, slot_np, full)
        if width:
            coverage = batched.cover(stream, self.table, self.rows, width)
            f, g = batched.activations(stream, coverage.row, self.rows, distinct)
            for sae, (index, f_all) in encoded.items():
                self._take_exact(f, coverage, stream, slot_np, sae, index, f_all)
            difference = torch.where(
                coverage.covered, batched.change(f, coverage.op, coverage.value), 0.0
            )
            delta = batched.decoded(difference * g, coverage.row, self.rows, distinct)
            touched = coverage.covered.any(dim=1)
            for sae, (index, f_all) in encoded.items():
                self._reconstruct(delta, stream, coverage, slot_np, difference, sae, index, f_all)
            self._record_edits(stream, slot_np, coverage, f)
            self.counters.edited_tokens += int(touched.sum())
            self.counters.skipped_tokens += int(coverage.skipped.any(dim=1).sum())
        for sae, (index, f_all) in encoded.items():
            self._record_reads(stream, slot_np, sae, index, f_all)
        if delta is not None and touched is not None:
            batched.add_delta(hidden_states, stream.token[touched], delta[touched])

    def _encode(
        self, stream: Stream, slot_np: IntArray, full: set[int]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Full activations by SAE: the tokens of ``stream`` that need them, and ``f``."""
        encoded = {}
        for sae in sorted(full):
            index_np = np.flatnonzero([sae in self.work[int(s)].full for s in slot_np])
            if len(index_np):
                index = torch.from_numpy(index_np).to(stream.x.device)
                encoded[sae] = (index, self.saes[sae].encode(stream.x[index]))
        return encoded

    def _columns(self, slot: int, sae: int) -> list[tuple[int, PlannedEdit]]:
        """``(column of the table, edit)`` of one SAE in one slot."""
        edits = self.work[slot].edits
        return [(column, edit) for column, (_, edit) in enumerate(edits) if edit.sae == sae]

    def _slot_groups(
        self, slot_np: IntArray, index: Tensor
    ) -> Sequence[tuple[int, Tensor, Tensor]]:
        """By slot: ``(slot, where in index, where in the chunk)``."""
        slots = slot_np[index.cpu().numpy()]
        groups = []
        for slot in np.unique(slots):
            local = torch.from_numpy(np.flatnonzero(slots == slot)).to(index.device)
            groups.append((int(slot), local, index[local]))
        return groups

    def _take_exact(
        self,
        f: Tensor,
        coverage: Coverage,
        stream: Stream,
        slot_np: IntArray,
        sae: int,
        index: Tensor,
        f_all: Tensor,
    ) -> None:
        """Replace row-wise activations by those of the full encode (top-k needs every latent)."""
        for slot, local, here in self._slot_groups(slot_np, index):
            columns = self._columns(slot, sae)
            if columns:
                latents = torch.tensor([edit.latent for _, edit in columns], device=f.device)
                at = torch.tensor([column for column, _ in columns], device=f.device)
                f[here[:, None], at] = f_all[local[:, None], latents]

    def _reconstruct(
        self,
        delta: Tensor,
        stream: Stream,
        coverage: Coverage,
        slot_np: IntArray,
        difference: Tensor,
        sae: int,
        index: Tensor,
        f_all: Tensor,
    ) -> None:
        """``error_term: false``: on covered tokens the stream becomes ``decode(f')``."""
        for slot, local, here in self._slot_groups(slot_np, index):
            if self.work[slot].decode != sae:
                continue
            covered = coverage.covered[here].any(dim=1)
            if not bool(covered.any()):
                continue
            local, here = local[covered], here[covered]
            f_new = f_all[local]
            for column, edit in self._columns(slot, sae):
                f_new[:, edit.latent] += difference[here, column]
            x = stream.x[here]
            delta[here] = self.saes[sae].decode(f_new, x) - x

    def _record_edits(
        self, stream: Stream, slot_np: IntArray, coverage: Coverage, f: Tensor
    ) -> None:
        for slot in np.unique(slot_np):
            work = self.work[int(slot)]
            if work.record is None or not work.plan.report or not work.edits:
                continue
            here = torch.from_numpy(np.flatnonzero(slot_np == slot)).to(f.device)
            n = len(work.edits)
            work.record.put_edits(
                [i for i, _ in work.edits],
                stream.position[here].cpu().numpy(),
                f[here, :n].cpu().numpy(),
                coverage.covered[here, :n].cpu().numpy(),
                coverage.skipped[here, :n].cpu().numpy(),
            )

    def _record_reads(
        self, stream: Stream, slot_np: IntArray, sae: int, index: Tensor, f_all: Tensor
    ) -> None:
        for slot, local, here in self._slot_groups(slot_np, index):
            work = self.work[slot]
            read = work.plan.read
            if work.record is None or read is None or read.sae != sae:
                continue
            coverage, start, end = torch.tensor(
                [read.coverage, read.start, read.end], device=here.device
            )
            covered = stream.covers(coverage, start, end).squeeze(1)[here]
            sink_norm = self.saes[sae].card.sink_norm
            if sink_norm is not None and not read.coverage & COVERS_SINKS:
                covered &= stream.norm[here] <= sink_norm
            if not bool(covered.any()):
                continue
            f = f_all[local[covered]]
            position = stream.position[here[covered]].cpu().numpy()
            work.record.put_read(position, *strongest(f, read.top_k))
            if read.aggregate is not None:
                totals = work.record.totals(f.shape[1])
                fresh = position >= totals.counted_to
                if fresh.any():
                    totals.add(f.cpu().numpy()[fresh])
                    totals.counted_to = int(position.max()) + 1


def strongest(f: Tensor, k: int) -> tuple[IntArray, FloatArray]:
    """The ``k`` largest positive activations of each token, best first, ties by lower index.

    Args:
        f: ``[n, d_sae]`` activations.
        k: how many.

    Returns:
        latents and values, ``[n, k]``; where fewer are positive the rest is zero.
    """
    k_found = min(k, f.shape[1])
    least = f.topk(k_found, dim=1).values[:, -1:]
    # A tie at the k-th place makes more than k candidates; the order below settles it.
    token, latent = ((f >= least) & (f > 0)).nonzero(as_tuple=True)
    value = f[token, latent].cpu().numpy()
    token_np, latent_np = token.cpu().numpy(), latent.cpu().numpy()
    order = np.lexsort((latent_np, -value, token_np))
    token_np, latent_np, value = token_np[order], latent_np[order], value[order]
    rank = np.arange(len(token_np)) - np.searchsorted(token_np, token_np, side="left")
    keep = rank < k
    latents = np.zeros((f.shape[0], k), dtype=np.int32)
    values = np.zeros((f.shape[0], k), dtype=np.float32)
    latents[token_np[keep], rank[keep]] = latent_np[keep]
    values[token_np[keep], rank[keep]] = value[keep]
    return latents, values
