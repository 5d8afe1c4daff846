"""What one worker does for steered requests: as they come and go, in each pass, and afterwards.

The runner adapters in ``steering/vllm`` drive it; nothing here knows vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.arrays import IntArray
from steering.request.plan import RowKey, SteeringPlan
from steering.worker.captures import Captures
from steering.worker.full_requests import FullRequests
from steering.worker.hooks_at_work import HooksAtWork
from steering.worker.ops.layout import NO_SLOT
from steering.worker.record import RequestRecord
from steering.worker.record_store import RecordStore
from steering.worker.reported_tokens import ReportedTokens
from steering.worker.slots import SlotAllocator
from steering.worker.stops import GatedSlots, Stops
from steering.worker.streamed_read import StreamedRead
from steering.worker.study_probes import StudyProbes
from steering.worker.worker_sites import WorkerSites


class RunningRequest(NamedTuple):
    """A steered request that is in the batch now.

    Attributes:
        plan: what it asks for.
        slot: its slot.
        rows: the rows that it uses.
    """

    plan: SteeringPlan
    slot: int
    rows: list[RowKey]


class SteeringState:
    """The worker's side of steering: its requests, the pass under way, and what was recorded.

    Args:
        sites: the hook points that this worker holds, and what they share.
        record: whether this worker keeps records (one of each tensor-parallel group does).

    Attributes:
        hooks: a hook point's name to its site.
        graphs: whether CUDA graphs hold the op.
        max_num_tokens: tokens of the largest pass.
    """

    def __init__(self, sites: WorkerSites, *, record: bool) -> None:
        self.step = sites.step
        self.graphs = sites.graphs
        self.max_num_tokens = sites.max_num_tokens
        self.hooks = sites.by_hook
        self.rows = sites.rows
        self.reports = sites.reports
        self.slots = SlotAllocator(sites.num_slots)
        self.records = RecordStore()
        self.captures = Captures()
        self.op_seconds = 0.0
        self._record = record
        self._saes = sites.saes
        self._owned_saes = sites.residency.saes.keys()
        self.probes = StudyProbes(sites.residency, sites.device)
        self._always_launch = sites.always_launch
        self._outputs = sites.outputs
        self._facts = sites.facts
        self._gate_state = sites.gate_state
        self._f = sites.f
        self._token_counts = sites.token_counts
        self._gated = GatedSlots(sites.num_slots, sites.device)
        self._reported = ReportedTokens(sites.num_slots, sites.f, sites.share)
        self._at_work = HooksAtWork(self.hooks)
        self._full = FullRequests()
        self._running: dict[str, RunningRequest] = {}
        self._paused_gates: dict[str, Tensor] = {}
        self._internal = 0  # how many of the running requests no client sent

    def compile_kernel(self, dtype: torch.dtype, hidden_dtypes: Iterable[torch.dtype]) -> None:
        """Have the kernel compiled before the first steered request, on a token without a slot.

        Args:
            dtype: the model's dtype, which is the residual's.
            hidden_dtypes: the dtypes of the hidden states that the op is given.
        """
        for site in self.hooks.values():
            width = site.buffers.rows.W_enc.shape[1]
            residual = torch.zeros(1, width, dtype=dtype, device=self._token_counts.device)
            for hidden_dtype in hidden_dtypes:
                hidden_states = torch.zeros_like(residual, dtype=hidden_dtype)
                site.compile_kernel(hidden_states, residual)
                site.compile_kernel(hidden_states, None)  # another kernel

    def add_request(self, req_id: str, plan: SteeringPlan, child: int = 0) -> None:
        """A steered request enters the batch: take a slot, make its rows resident, fill its tables.

        Args:
            req_id: the runner's name for it.
            plan: what it asks for.
            child: which of the choices of ``n > 1`` it is, else 0.
        """
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
        """A request ended, in the batch or while it was preempted. Unsteered ones are ignored."""
        self._leave(req_id)
        self._paused_gates.pop(req_id, None)
        self.records.close(req_id)

    def pause_request(self, req_id: str) -> None:
        """A request was preempted: it leaves the batch, and is added again when it resumes.

        What its conditions found is kept for that. If the prompt decides about edits of generated
        tokens at an earlier layer, and one pass computes both again, the decision must be known
        before that pass.
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
        """The request's slot; NO_SLOT if it is not steered."""
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
            req_ids: the requests of the input batch, in the runner's order.
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
        # A graph replayed for nobody would find conditions fulfilled at the last pass's positions.
        self.step.end(wipe=self._always_launch and self._gated.in_pass)

    def needs_full(self, req_ids: Iterable[str]) -> bool:
        """Whether a pass over these requests must run outside CUDA graphs."""
        return self._full.any(req_ids)

    def stops(self) -> Stops | None:
        """Which requests of the last pass a ``stop_when`` ends, and where; see `Stops`.

        Ask once, after `end_step` and before the next `begin_step`. This does not wait for the
        device. None if no request of the pass has a ``stop_when``, or if it was asked already.
        """
        return self._gated.stops(self.step.positions, self._gate_state, self._f)

    def apply_at(self, hook: str, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Edit the pass's tokens at one hook point, in place; the registered op calls this.

        Args:
            hook: the hook point.
            hidden_states: ``[num_tokens, d_in]`` in the model's dtype or float32; a leading axis of
                one is allowed.
            residual: the same shape in the model's dtype, or None; only read.
        """
        if hook not in self._at_work.in_pass and not self._always_launch:
            return
        started = time.perf_counter()
        if hidden_states.dim() != 2:  # some layers carry a batch axis of one
            hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
            residual = None if residual is None else residual.view(-1, residual.shape[-1])
        num_tokens, width = hidden_states.shape
        # If the stream were not whole here (but sharded by tokens, say), the edits would hit the
        # wrong rows.
        assert num_tokens >= self.step.num_tokens, (num_tokens, self.step.num_tokens)
        assert width == self.hooks[hook].width, (hook, width)
        assert num_tokens <= self.max_num_tokens, (num_tokens, self.max_num_tokens)
        self.hooks[hook].apply(hidden_states, residual, self.step)
        # A self-check takes nearly all of the time of its passes, and no client asked for it.
        if not self._internal:
            self.op_seconds += time.perf_counter() - started

    def take_results(self, key: str, limits: Mapping[int, int]) -> list[dict[str, Any]]:
        """Fetch and forget a request's records.

        Args:
            key: the plan's key.
            limits: child index to the number of positions that entered the model for good; 0 if
                nobody wants its results.

        Returns:
            For each child that has a record here, `RequestRecord.summary`, and what came of its
            probes as ``probed``, if it has any.
        """
        # There is no need to wait for the pass under way. A position is copied on the stream before
        # the next token is sampled (or sent to the next pipeline stage), and whoever asks has seen
        # the last token: all positions that count have been copied.
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

        Rows are in the order in which they were computed: a later row of the same position replaces
        an earlier one. Passes whose copies are still under way come with a later call. A thread
        other than the one that drives the passes may call this.

        Args:
            streaming: what `RecordStore.streaming` returned while the pass was under way.
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
        """Forget what studies' runs left under these keys."""
        self.captures.forget(keys)
        self.probes.kept.forget(keys)

    def token_counts(self) -> tuple[int, int]:
        """Tokens edited, and tokens spared as sinks, on either path since the last `take_stats`."""
        edited, skipped = self._token_counts.tolist()
        return edited, skipped

    def take_stats(self) -> dict[str, float]:
        """The gauges as they are now, and the counters since the last call; see `WorkerStats`."""
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
