"""One hook point at run time: the SAEs that sit there, their edits, and what a pass does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sae.arrays import FloatArray, IntArray
from sae.sae import SAE
from steering.request.limits import MAX_TOP_K
from steering.request.plan import COVERS_SINKS, COVERS_SPECIAL, SELF_CHECK, SteeringPlan
from steering.worker.batch_parts import BatchPart, BatchParts, FullPart, SlotWork
from steering.worker.kernel_reports import KernelReports, ReportPart
from steering.worker.ops import BoundKernel, batched
from steering.worker.ops.batched import Coverage, Stream
from steering.worker.record import RequestRecord
from steering.worker.residency import Residency
from steering.worker.rows import RowPool
from steering.worker.slots import EditTable, to_device
from steering.worker.step import Step


@dataclass
class Counters:
    """Running totals of one worker, for metrics."""

    edited_tokens: int = 0
    skipped_tokens: int = 0
    op_seconds: float = 0.0


@dataclass(frozen=True)
class KernelPath:
    """The kernel of one hook point, bound to its buffers, and those that it reports in.

    Attributes:
        launch: edits ``hidden_states`` and reads ``residual``, ``[num_tokens, d_in]`` each.
        report_f: ``[max_num_tokens, MAX_INTERVENTIONS]`` float32, activations before the edit.
        reports: ``[num_slots]`` int32, whether a slot's activations are wanted.
    """

    launch: BoundKernel
    report_f: Tensor
    reports: Tensor


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
    residency: Residency
    kernel: KernelPath | None = None
    work: dict[int, SlotWork] = field(default_factory=dict)
    _full_slots: set[int] = field(default_factory=set)
    _parts: BatchParts = field(init=False)

    def __post_init__(self) -> None:
        self._parts = BatchParts(self.saes, self.rows, self.table, self.prompt_len, self.work)

    def set_slot(
        self,
        slot: int,
        plan: SteeringPlan,
        row_of: Mapping[tuple[int, int], int],
        full: frozenset[int],
        record: RequestRecord | None,
    ) -> None:
        """Rewrite a slot whole for a request that starts.

        Args:
            slot: the slot to rewrite.
            plan: the request.
            row_of: where the rows of its latents are.
            full: the SAEs, here or elsewhere, that must encode its tokens in full.
            record: what its activations are recorded in, if they are.
        """
        self._parts.forget()
        edits = [(i, edit) for i, edit in enumerate(plan.edits) if edit.sae in self.saes]
        self.table.write(
            slot,
            [edit for _, edit in edits],
            [row_of[edit.sae, edit.latent] for _, edit in edits],
        )
        decode = None if plan.error_term or not edits else edits[0][1].sae
        full &= self.saes.keys()
        self.work.pop(slot, None)
        self._full_slots.discard(slot)
        if edits or full:
            self.work[slot] = SlotWork(edits, full, decode, plan, record)
        if full:
            self._full_slots.add(slot)
        if self.kernel is not None:
            self.kernel.reports[slot] = record is not None and plan.report and bool(edits)

    def clear_slot(self, slot: int) -> None:
        """Empty a slot whose request left the batch."""
        self._parts.forget()
        self.table.write(slot, [], [])
        self.work.pop(slot, None)
        self._full_slots.discard(slot)

    def needs_full(self, slots: Iterable[int]) -> bool:
        """Whether this pass must run outside CUDA graphs: some slot needs a full encode."""
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
        if self.kernel is not None and not (step.active and self.needs_full(step.slots_np)):
            self.kernel.launch(hidden_states, residual)
        else:
            self._apply_in_torch(hidden_states, residual, step)

    @torch.inference_mode()
    def _apply_in_torch(self, hidden_states: Tensor, residual: Tensor | None, step: Step) -> None:
        for part in self._parts.of(step):
            stream = batched.gather_stream(
                hidden_states,
                residual,
                part.token,
                step.positions,
                step.input_ids,
                self.is_special,
            )
            self._apply_part(hidden_states, stream, part)

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
            index = to_device(torch.from_numpy(np.concatenate(tokens)), step.positions.device)
            width = max(len(part.columns) for part in parts)
            reports.copy(step.positions[index], self.kernel.report_f[index, :width], parts)

    def _apply_part(self, hidden_states: Tensor, stream: Stream, part: BatchPart) -> None:
        encoded = [(full, self._encode(full.sae, stream.x[full.index])) for full in part.full]
        edits = part.edits
        delta = None
        if edits is not None:
            coverage = batched.cover(stream, edits)
            f, g = batched.activations(stream, edits, self.rows)
            for full, f_all in encoded:
                if full.latent is not None:
                    exact = f_all.gather(1, full.latent)
                    f[full.index] = torch.where(full.own, exact, f[full.index])
            difference = batched.difference(f, edits, coverage.covered)
            delta = batched.decoded(difference if g is None else difference * g, edits, self.rows)
            for full, f_all in encoded:
                self._reconstruct(delta, stream, coverage, difference, full, f_all)
            self._record_edits(stream, part, coverage, f)
        for full, f_all in encoded:
            self._record_reads(stream, full, f_all)
        if delta is not None:
            touched = coverage.covered.any(dim=1)
            num_touched = int(touched.sum())
            self.counters.edited_tokens += num_touched
            if coverage.skipped is not None:
                self.counters.skipped_tokens += int(coverage.skipped.any(dim=1).sum())
            if num_touched:
                batched.add_delta(
                    hidden_states, stream, delta, None if num_touched == len(delta) else touched
                )

    @torch.inference_mode()
    def rehearse(self, sae: int, hidden_states: Tensor) -> None:
        """Take the memory that one part of a full pass takes, and give it back; nothing is edited.

        Args:
            sae: one of those here.
            hidden_states: ``[num_tokens, d_in]`` model dtype, of the largest pass.
        """
        x = hidden_states[: self._parts.tokens_in_part([sae])].float()
        f = self._encode(sae, x)
        strongest(f, MAX_TOP_K)
        self._decode(sae, f, x)

    def _encode(self, sae: int, x: Tensor) -> Tensor:
        self.residency.bring(sae)
        return self.saes[sae].encode(x)

    def _decode(self, sae: int, f: Tensor, x: Tensor) -> Tensor:
        self.residency.bring(sae)
        return self.saes[sae].decode(f, x)

    def _reconstruct(
        self,
        delta: Tensor,
        stream: Stream,
        coverage: Coverage,
        difference: Tensor,
        full: FullPart,
        f_all: Tensor,
    ) -> None:
        """``error_term: false``: on covered tokens the stream becomes ``decode(f')``."""
        for tokens in full.groups:
            if tokens.work.decode != full.sae:
                continue
            covered = coverage.covered[tokens.here].any(dim=1)
            if not bool(covered.any()):
                continue
            local, here = tokens.local[covered], tokens.here[covered]
            f_new = f_all[local]
            for column, edit in tokens.columns:
                f_new[:, edit.latent] += difference[here, column]
            x = stream.x[here]
            delta[here] = self._decode(full.sae, f_new, x) - x

    def _record_edits(self, stream: Stream, part: BatchPart, coverage: Coverage, f: Tensor) -> None:
        if not part.reports:
            return
        position, f_np = stream.position.cpu().numpy(), f.cpu().numpy()
        covered = coverage.covered.cpu().numpy()
        skipped = (
            np.zeros_like(covered) if coverage.skipped is None else coverage.skipped.cpu().numpy()
        )
        for work, record, here in part.reports:
            n = len(work.edits)
            record.put_edits(
                [i for i, _ in work.edits],
                position[here],
                f_np[here, :n],
                covered[here, :n],
                skipped[here, :n],
            )

    def _record_reads(self, stream: Stream, full: FullPart, f_all: Tensor) -> None:
        for tokens in full.groups:
            record, read = tokens.work.record, tokens.work.plan.read
            if record is None or read is None or read.sae != full.sae:
                continue
            here = tokens.here
            position = stream.position[here]
            record.forget_reads(position.cpu().numpy())
            low, high = batched.window(
                *torch.tensor(
                    [read.coverage, read.start, read.end, tokens.work.plan.prompt_len],
                    device=here.device,
                )
            )
            covered = (position >= low) & (position < high)
            if not read.coverage & COVERS_SPECIAL:
                covered &= ~stream.special[here]
            sink_norm = self.saes[full.sae].card.sink_norm
            if sink_norm is not None and not read.coverage & COVERS_SINKS:
                covered &= stream.norm[here] <= sink_norm
            if not bool(covered.any()):
                continue
            f = f_all[tokens.local[covered]]
            position_np = position[covered].cpu().numpy()
            if read.aggregate == SELF_CHECK:
                x = stream.x[here][covered]
                x_hat = self._decode(full.sae, f, x)
                l0 = (f != 0).sum(dim=1)
                record.observed().put(position_np, *(t.cpu().numpy() for t in (x, x_hat, l0)))
                continue
            record.put_read(position_np, *strongest(f, read.top_k))
            if read.aggregate is not None:
                totals = record.totals(f.shape[1])
                fresh = position_np >= totals.counted_to
                if fresh.any():
                    totals.add(f.cpu().numpy()[fresh])
                    totals.counted_to = int(position_np.max()) + 1


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
