"""Everything one worker knows of steering: rows, slots, hook points, the pass under way, records.

The runner adapters in ``steering/vllm`` drive it; nothing here knows vLLM.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from sae.arrays import IntArray
from sae.card import HEADS, HookPoint
from sae.sae import SAE
from steering.request.limits import MAX_INTERVENTIONS
from steering.request.plan import RowKey, SteeringPlan
from steering.worker.captures import Captures
from steering.worker.full_requests import FullRequests
from steering.worker.gates import GateState, GateTable
from steering.worker.hooks_at_work import HooksAtWork
from steering.worker.ops.buffers import Buffers, InputNorm, Kernel
from steering.worker.ops.layout import MAX_ENTRIES, NO_SLOT
from steering.worker.pass_reports import PassReports
from steering.worker.record import RequestRecord
from steering.worker.record_store import RecordStore
from steering.worker.reported_tokens import ReportedTokens
from steering.worker.residency import Residency
from steering.worker.rows import RowPool
from steering.worker.site import SharedHeads, Site
from steering.worker.slots import EditTable, SlotAllocator, SlotFacts
from steering.worker.step import Step
from steering.worker.stops import GatedSlots, Stops
from steering.worker.streamed_read import StreamedRead
from steering.worker.study_probes import StudyProbes
from steering.worker.whole_outputs import WholeOutputs

#: Token ids past the vocabulary that a runner may still see: multimodal models put placeholders
#: of images and sound there.
SPARE_TOKEN_IDS: Final = 1024


class RunningRequest(NamedTuple):
    """A steered request that is in the batch now."""

    plan: SteeringPlan
    slot: int
    rows: list[RowKey]


class SteeringState:
    """The worker's side of steering.

    Args:
        saes: every served SAE, in the order of the configuration; index is identity.
        owned: hook points whose layer this worker holds (all but under pipeline parallelism).
        num_slots: most requests that run at once.
        max_rows: capacity of the row pool.
        d_in: hidden size.
        step: the pass's token buffers.
        special_token_ids: tokens that edits leave alone by default.
        vocab_size: size of the token table.
        record: whether this worker keeps records (one of each tensor-parallel group does).
        device: where the model runs.
        kernel: for passes in which rows alone are enough; None where no kernel runs.
        graphs: CUDA graphs hold the op, so it is launched in idle passes too.
        resident: see `Residency`.
        limit: see `layout.FLOAT16_LIMIT`; infinite for streams of other dtypes.
        input_norms: of hook points that are behind one.
        heads: how tensor-parallel ranks share the heads, for hook points that are of them; None
            where every rank has all.
    """

    def __init__(
        self,
        saes: Sequence[SAE],
        owned: Sequence[HookPoint],
        *,
        num_slots: int,
        max_rows: int,
        d_in: int,
        step: Step,
        special_token_ids: Sequence[int],
        vocab_size: int,
        record: bool,
        device: torch.device,
        kernel: Kernel | None,
        graphs: bool,
        resident: str | None = None,
        limit: float = math.inf,
        input_norms: Mapping[str, InputNorm] = MappingProxyType({}),
        heads: SharedHeads | None = None,
    ) -> None:
        self.step = step
        self.graphs = graphs
        self._always_launch = kernel is not None and graphs
        self.slots = SlotAllocator(num_slots)
        widths = [width for sae in saes for width in (sae.card.d_in, sae.card.d_out)]
        self.rows = RowPool(saes, max_rows, max([d_in, *widths]), device)
        self.records = RecordStore()
        self.reports = PassReports()
        self.captures = Captures()
        self.op_seconds = 0.0
        self.d_in = d_in
        self._limit = limit
        self._input_norms = input_norms
        self._heads = heads
        self._outputs = WholeOutputs()
        self._record = record
        self._saes = saes
        self._facts = SlotFacts(num_slots, device)
        self.max_num_tokens = max_num_tokens = len(step.token_slot)
        self._gate_state = GateState(num_slots, max_num_tokens, device)
        self._gated = GatedSlots(num_slots, device)
        # One buffer for all hook points: an edit and a gate have columns of their own.
        self._f = torch.zeros(max_num_tokens, MAX_ENTRIES, dtype=torch.float32, device=device)
        self._share = torch.zeros(max_num_tokens, max(len(owned), 1), device=device)
        split = any(not sae.card.one_place for sae in saes)
        self._carried = (
            torch.zeros(max_num_tokens, MAX_INTERVENTIONS, dtype=torch.float32, device=device)
            if split
            else None
        )
        # Tokens edited and kept off by a sink.
        self._token_counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._reported = ReportedTokens(num_slots, self._f, self._share)
        is_special = torch.zeros(vocab_size + SPARE_TOKEN_IDS, dtype=torch.bool)
        is_special[[t for t in special_token_ids if t < len(is_special)]] = True
        self._is_special = is_special.to(device)
        by_index = dict(enumerate(saes))
        places = {str(point) for point in owned}
        residency = Residency(
            {i: sae for i, sae in by_index.items() if sae.card.reads in places}, device, resident
        )
        self.hooks = {
            str(point): self._site(str(point), column, by_index, kernel, residency)
            for column, point in enumerate(owned)
        }
        self._owned_saes = {i for site in self.hooks.values() for i in site.saes}
        self._at_work = HooksAtWork(self.hooks)
        self.probes = StudyProbes(residency, self._owned_saes, device)
        self._running: dict[str, RunningRequest] = {}
        self._full = FullRequests()
        self._paused_gates: dict[str, Tensor] = {}
        self._internal = 0  # those of the running that no client sent

    def _site(
        self,
        hook: str,
        column: int,
        saes: Mapping[int, SAE],
        kernel: Kernel | None,
        residency: Residency,
    ) -> Site:
        num_slots, device = self.slots.num_slots, self._token_counts.device
        reading = {i: sae for i, sae in saes.items() if sae.card.reads == hook}
        writing = {i: sae for i, sae in saes.items() if hook in sae.card.writes}
        width = self._width(reading, writing)
        split = any(not sae.card.one_place for sae in (*reading.values(), *writing.values()))
        heads = self._heads if HookPoint.parse(hook).kind == HEADS else None
        buffers = Buffers(
            token_slot=self.step.token_slot,
            positions=self.step.positions,
            input_ids=self.step.input_ids,
            is_special=self._is_special,
            slots=self._facts,
            table=EditTable(num_slots, device),
            reads=EditTable(num_slots, device),
            gates=GateTable(num_slots, device),
            gate_state=self._gate_state,
            rows=self.rows.columns(0, width),
            f=self._f,
            share=self._share[:, column],
            carried=self._carried if split else None,
            counters=self._token_counts,
            limit=self._limit,
            input_norm=self._input_norms.get(hook, InputNorm()),
        )
        return Site(
            hook,
            reading,
            writing,
            buffers,
            residency,
            self.reports,
            self._outputs,
            None if kernel is None else kernel.bound(buffers),
            self._always_launch,
            heads,
        )

    def _width(self, reading: Mapping[int, SAE], writing: Mapping[int, SAE]) -> int:
        """Elements of a token's stream at a hook point where these read and write."""
        widths = {sae.card.d_in for sae in reading.values()}
        widths |= {sae.card.d_out for sae in writing.values()}
        assert len(widths) <= 1, widths
        return widths.pop() if widths else self.d_in

    def compile_kernel(self, dtype: torch.dtype, hidden_dtypes: Iterable[torch.dtype]) -> None:
        """Have the kernel compiled before the first steered request, on a token without a slot.

        Args:
            dtype: of the model, and so of the residual.
            hidden_dtypes: of the hidden states that the op is given.
        """
        for site in self.hooks.values():
            width = site.buffers.rows.W_enc.shape[1]
            residual = torch.zeros(1, width, dtype=dtype, device=self._token_counts.device)
            for hidden_dtype in hidden_dtypes:
                for other in (residual, None):  # a kernel each
                    site.compile_kernel(torch.zeros_like(residual, dtype=hidden_dtype), other)

    def add_request(self, req_id: str, plan: SteeringPlan, child: int = 0) -> None:
        """A steered request enters the batch: take a slot, make its rows resident, fill tables."""
        assert req_id not in self._running, req_id
        if plan.keep is not None:
            self.captures.open(req_id, plan.keep)
        if plan.only_keeps:
            return
        slot = self.slots.take()
        rows = self._rows_of(plan)
        row_of = self.rows.acquire(rows)
        record = None
        if plan.wants_results and self._record:
            record = self.records.open(req_id, lambda: self._new_record(plan, child))
            self.reports.follow(record)
        reports = record is not None and len(record.columns) > 0
        self._facts.write(slot, plan.prompt_len, plan.max_share, reports)
        self._reported.write(slot, record if reports else None)
        self._gate_state.write(slot, plan.gates, self._paused_gates.pop(req_id, None))
        self._gated.write(slot, req_id, plan.gates)
        full = plan.encoded(self._exact_from_row)
        for site in self._at_work.of(plan):
            site.set_slot(slot, plan, row_of, full, record)
        self._at_work.forget()
        if full or plan.kept_streams:
            until = plan.encoded_until(self._exact_from_row)
            self._full.add(req_id, plan.prompt_len, until)
        self._running[req_id] = RunningRequest(plan, slot, rows)
        self._internal += plan.internal

    def remove_request(self, req_id: str) -> None:
        """A request ended, in the batch or while it was preempted; unsteered ones are ignored."""
        self._leave(req_id)
        self._paused_gates.pop(req_id, None)
        self.records.close(req_id)

    def pause_request(self, req_id: str) -> None:
        """A request was preempted: it leaves the batch and comes back as one that is added.

        What its conditions found goes with it: a prompt that decides about generated tokens at an
        earlier layer must be known where both are computed again in one pass.
        """
        request = self._running.get(req_id)
        if request is not None and request.plan.gates:
            self._paused_gates[req_id] = self._gate_state.saved(request.slot)
        self._leave(req_id)
        self.records.pause(req_id)

    def _leave(self, req_id: str) -> None:
        self.captures.close(req_id)
        request = self._running.pop(req_id, None)
        if request is None:
            return
        self._full.remove(req_id)
        self._internal -= request.plan.internal
        for site in self._at_work.of(request.plan):
            site.clear_slot(request.slot)
        self._at_work.forget()
        self._reported.write(request.slot, None)
        self._gated.write(request.slot, req_id, ())
        self.rows.release(request.rows)
        self.slots.give_back(request.slot)

    def slot_of(self, req_id: str) -> int:
        """The request's slot, NO_SLOT for unsteered ones."""
        request = self._running.get(req_id)
        return NO_SLOT if request is None else request.slot

    def begin_step(
        self,
        req_ids: Sequence[str],
        query_start_loc: IntArray,
        first_positions: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """Lay out a forward pass.

        Args:
            req_ids: the input batch's requests, in the runner's order.
            query_start_loc: ``[num_reqs + 1]`` offsets of their tokens.
            first_positions: see `Captures.begin`.
        """
        self.captures.begin(req_ids, query_start_loc, first_positions)
        self._full.begin(req_ids, query_start_loc)
        if not self._running:
            self.step.begin((), query_start_loc[:1])
            self._gated.begin(self.step, self._gate_state)
            return
        self.reports.settle()
        self.step.begin([self.slot_of(req_id) for req_id in req_ids], query_start_loc)
        self._gated.begin(self.step, self._gate_state)
        self._at_work.begin(self.step)

    def end_step(self) -> None:
        """The forward pass is over."""
        self.captures.end()
        if self.step.active:
            self._reported.collect(self.step, self.reports)
        for req_id in self._full.end():
            request = self._running[req_id]
            for site in self._at_work.of(request.plan):
                site.encode_no_more(request.slot)
            self._at_work.forget()
        self._outputs.forget()
        self._at_work.end()
        # A replay for nobody would have events at positions of the last pass.
        self.step.end(wipe=self._always_launch and self._gated.in_pass)

    def needs_full(self, req_ids: Iterable[str]) -> bool:
        """Whether a pass over these requests must run outside CUDA graphs."""
        return self._full.any(req_ids)

    def stops(self) -> Stops | None:
        """Which requests of the last pass a ``stop_when`` ends, and where; see `Stops`.

        To be asked after `end_step` and before the next `begin_step`, once: a pass for nobody that
        follows has no answer. Nothing waits for the device. None where no request of the pass has a
        ``stop_when``.
        """
        return self._gated.stops(self.step.positions, self._gate_state, self._f)

    def apply_at(self, hook: str, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Edit the pass's tokens at one hook point, in place; called by the registered op."""
        if hook not in self._at_work.in_pass and not self._always_launch:
            return
        started = time.perf_counter()
        if hidden_states.dim() != 2:  # some layers carry a batch axis of one
            hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
            residual = None if residual is None else residual.view(-1, residual.shape[-1])
        num_tokens, width = hidden_states.shape
        # A stream that is not whole here (sharded by tokens, say) would be edited in wrong rows.
        assert num_tokens >= self.step.num_tokens, (num_tokens, self.step.num_tokens)
        assert width == self.hooks[hook].width, (hook, width)
        assert num_tokens <= self.max_num_tokens, (num_tokens, self.max_num_tokens)
        self.hooks[hook].apply(hidden_states, residual, self.step)
        # Beside a self-check nearly all of the time is that one's, and no client asked for it.
        if not self._internal:
            self.op_seconds += time.perf_counter() - started

    def take_results(self, key: str, limits: Mapping[int, int]) -> list[dict[str, Any]]:
        """Fetch and forget a request's records.

        Args:
            key: the plan's key.
            limits: child index to the number of positions that entered the model for good.
        """
        # No need to wait for the pass under way. A position's copy is made on the stream before the
        # next token is sampled (or sent to the next pipeline stage), and whoever asks has seen the
        # last token: the copies of all positions that count have happened.
        summaries = []
        for child, limit in limits.items():
            record = self.records.take(key, child)
            if record is not None:
                self.reports.settle_one(record)
                summaries.append(record.summary(limit))
                if record.plan.probes:
                    summaries[-1]["probed"] = self.probes.results(record, limit)
        return summaries

    def take_streamed(self, streaming: Mapping[str, RequestRecord]) -> dict[str, StreamedRead]:
        """What was read since the last call, by request id.

        Rows follow each other as they were computed: a later one of the same position replaces an
        earlier one. Passes whose copies are still under way come with a later call. Another thread
        than the one that drives the passes may call it.

        Args:
            streaming: what `RecordStore.streaming` said while the pass was under way.
        """
        if not streaming:
            return {}
        self.reports.settle_all()
        return {
            req_id: StreamedRead(record.plan.key, record.child, *rows)
            for req_id, record in streaming.items()
            if record.top is not None and (rows := record.top.unsent()) is not None
        }

    def forget(self, keys: Sequence[str]) -> None:
        """Forget what is kept of studies' runs under these keys."""
        self.captures.forget(keys)
        self.probes.kept.forget(keys)

    def token_counts(self) -> tuple[int, int]:
        """Tokens edited, and kept off by a sink, since the last `take_stats`, on either path."""
        edited, skipped = self._token_counts.tolist()
        return edited, skipped

    def take_stats(self) -> dict[str, float]:
        """Gauges now, and counters since the last call."""
        edited, skipped = self.token_counts()
        self._token_counts.zero_()
        stats = {
            "slots_in_use": self.slots.in_use - self._internal,
            "slots_capacity": self.slots.num_slots,
            "rows_in_use": self.rows.rows_in_use,
            "rows_capacity": self.rows.capacity,
            "results_held": self.records.clients + len(self.captures) + len(self.probes.kept),
            "edited_tokens": edited,
            "skipped_tokens": skipped,
            "op_seconds": self.op_seconds,
        }
        self.op_seconds = 0.0
        return stats

    def _exact_from_row(self, sae: int) -> bool:
        return self._saes[sae].card.exact_from_row

    def _new_record(self, plan: SteeringPlan, child: int) -> RequestRecord:
        columns = {hook: site.edits_of(plan) for hook, site in self.hooks.items()}
        return RequestRecord(
            plan,
            child,
            sorted({i for of_hook in columns.values() for i in of_hook}),
            [(hook, column) for column, (hook, of_hook) in enumerate(columns.items()) if of_hook],
        )

    def _rows_of(self, plan: SteeringPlan) -> list[RowKey]:
        """The rows that this worker needs of a plan."""
        return sorted(key for key in plan.rows if key.sae in self._owned_saes)
