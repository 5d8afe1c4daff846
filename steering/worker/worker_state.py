"""Everything one worker knows of steering: rows, slots, hook points, the pass under way, records.

The runner adapters in ``steering/vllm`` drive it; nothing here knows vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from sae.arrays import IntArray
from sae.card import HookPoint
from sae.sae import SAE
from steering.request.limits import MAX_INTERVENTIONS
from steering.request.plan import SteeringPlan
from steering.worker.kernel_reports import KernelReports
from steering.worker.ops import Buffers, Kernel
from steering.worker.record import RecordStore
from steering.worker.residency import Residency
from steering.worker.rows import RowPool
from steering.worker.site import Counters, HookRuntime, KernelPath
from steering.worker.slots import NO_SLOT, EditTable, SlotAllocator
from steering.worker.step import Step

#: Token ids past the vocabulary that a runner may still see: multimodal models put placeholders
#: of images and sound there.
SPARE_TOKEN_IDS: Final = 1024


@dataclass
class RunningRequest:
    """A steered request that is in the batch now."""

    plan: SteeringPlan
    slot: int


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
        resident: which SAEs are kept on the device whole, see `Residency`.
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
    ) -> None:
        self.step = step
        self.graphs = graphs
        self._always_launch = kernel is not None and graphs
        self.slots = SlotAllocator(num_slots)
        self.rows = RowPool(saes, max_rows, d_in, device)
        self.records = RecordStore()
        self.counters = Counters()
        self.d_in = d_in
        self.max_num_tokens = len(step.token_slot)
        self._record = record
        self._kernel_reports = KernelReports()
        # Tokens edited and kept off by a sink, counted by the kernel.
        self._touched = torch.zeros(2, dtype=torch.int64, device=device)
        self.prompt_len = torch.zeros(num_slots, dtype=torch.int32, device=device)
        is_special = torch.zeros(vocab_size + SPARE_TOKEN_IDS, dtype=torch.bool)
        is_special[[t for t in special_token_ids if t < len(is_special)]] = True
        is_special = is_special.to(device)
        by_index = dict(enumerate(saes))
        tables = {str(point): EditTable(num_slots, device) for point in owned}
        residency = Residency(
            {i: sae for i, sae in by_index.items() if sae.card.hook in tables}, device, resident
        )
        self.hooks = {
            hook: HookRuntime(
                saes={i: sae for i, sae in by_index.items() if sae.card.hook == hook},
                rows=self.rows,
                table=table,
                is_special=is_special,
                prompt_len=self.prompt_len,
                counters=self.counters,
                residency=residency,
                kernel=None if kernel is None else self._kernel_path(kernel, table, is_special),
            )
            for hook, table in tables.items()
        }
        self._owned_saes = {i for hook in self.hooks.values() for i in hook.saes}
        self._saes = saes
        self._running: dict[str, RunningRequest] = {}
        # Those of the running that need a whole encode, here or in another pipeline stage: all
        # stages must choose the same kind of pass.
        self._full: set[str] = set()
        self._self_checks = 0  # those of the running that are

    def compile_kernel(self, dtype: torch.dtype, d_in: int) -> None:
        """Have the kernel compiled before the first steered request, on a token without a slot.

        Args:
            dtype: of the model.
            d_in: hidden size.
        """
        for hook in self.hooks.values():
            if hook.kernel is not None:
                hidden_states = torch.zeros(1, d_in, dtype=dtype, device=self.prompt_len.device)
                for residual in (hidden_states.clone(), None):  # a kernel each
                    hook.apply(hidden_states, residual, self.step)

    def add_request(self, req_id: str, plan: SteeringPlan, child: int = 0) -> None:
        """A steered request enters the batch: take a slot, make its rows resident, fill tables."""
        assert req_id not in self._running, req_id
        slot = self.slots.take()
        row_of = self.rows.acquire(self._latents(plan))
        record = None
        if plan.wants_results and self._record:
            record = self.records.open(req_id, plan, child)
        self.prompt_len[slot] = plan.prompt_len
        full = plan.encoded(lambda sae: self._saes[sae].card.exact_from_row)
        for hook in self.hooks.values():
            hook.set_slot(slot, plan, row_of, full, record)
        if full:
            self._full.add(req_id)
        self._running[req_id] = RunningRequest(plan, slot)
        self._self_checks += plan.is_self_check

    def remove_request(self, req_id: str) -> None:
        """A request ended, in the batch or while it was preempted; unsteered ones are ignored."""
        self._leave(req_id)
        self.records.close(req_id)

    def pause_request(self, req_id: str) -> None:
        """A request was preempted: it leaves the batch and comes back as one that is added."""
        self._leave(req_id)
        self.records.pause(req_id)

    def _leave(self, req_id: str) -> None:
        request = self._running.pop(req_id, None)
        if request is None:
            return
        self._full.discard(req_id)
        self._self_checks -= request.plan.is_self_check
        for hook in self.hooks.values():
            hook.clear_slot(request.slot)
        self.rows.release(self._latents(request.plan))
        self.slots.give_back(request.slot)

    def slot_of(self, req_id: str) -> int:
        """The request's slot, NO_SLOT for unsteered ones."""
        request = self._running.get(req_id)
        return NO_SLOT if request is None else request.slot

    def begin_step(self, req_ids: Sequence[str], query_start_loc: IntArray) -> None:
        """Lay out a forward pass.

        Args:
            req_ids: the input batch's requests, in the runner's order.
            query_start_loc: ``[num_reqs + 1]`` offsets of their tokens.
        """
        if not self._running:
            self.step.begin((), query_start_loc[:1])
            return
        self._kernel_reports.drain(wait=False)
        self.step.begin([self.slot_of(req_id) for req_id in req_ids], query_start_loc)

    def end_step(self) -> None:
        """The forward pass is over."""
        if self.step.active:
            for hook in self.hooks.values():
                hook.collect(self.step, self._kernel_reports)
        self.step.end()

    def needs_full(self, req_ids: Iterable[str]) -> bool:
        """Whether a pass over these requests must run outside CUDA graphs."""
        return bool(self._full) and not self._full.isdisjoint(req_ids)

    def apply_at(self, hook: str, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Edit the pass's tokens at one hook point, in place; called by the registered op."""
        if not (self.step.active or self._always_launch):
            return
        started = time.perf_counter()
        if hidden_states.dim() != 2:  # some layers carry a batch axis of one
            assert hidden_states.dim() == 3 and hidden_states.shape[0] == 1, hidden_states.shape
            hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
            residual = None if residual is None else residual.view(-1, residual.shape[-1])
        num_tokens, d_in = hidden_states.shape
        # A stream that is not whole here (sharded by tokens, say) would be edited in wrong rows.
        assert num_tokens >= self.step.num_tokens and d_in == self.d_in, (num_tokens, d_in)
        assert num_tokens <= self.max_num_tokens, (num_tokens, self.max_num_tokens)
        self.hooks[hook].apply(hidden_states, residual, self.step)
        # Beside a self-check nearly all of the time is that one's, and no client asked for it.
        if not self._self_checks:
            self.counters.op_seconds += time.perf_counter() - started

    def take_results(self, key: str, limits: Mapping[int, int]) -> list[dict[str, Any]]:
        """Fetch and forget a request's records.

        Args:
            key: the plan's key.
            limits: child index to the number of positions that entered the model for good.
        """
        # No need to wait for the pass under way. A position's copy is made on the stream before the
        # next token is sampled (or sent to the next pipeline stage), and whoever asks has seen the
        # last token: the copies of all positions that count have happened.
        self._kernel_reports.drain(wait=False)
        return [
            record.summary(limit)
            for child, limit in limits.items()
            if (record := self.records.take(key, child)) is not None
        ]

    def touched_tokens(self) -> tuple[int, int]:
        """Tokens edited, and kept off by a sink, since the last `take_stats`, on either path."""
        edited, skipped = self._touched.tolist()
        return self.counters.edited_tokens + edited, self.counters.skipped_tokens + skipped

    def take_stats(self) -> dict[str, float]:
        """Gauges now, and counters since the last call."""
        counters = self.counters
        edited, skipped = self.touched_tokens()
        self._touched.zero_()
        stats = {
            "slots_in_use": self.slots.in_use - self._self_checks,
            "slots_capacity": self.slots.num_slots,
            "rows_in_use": self.rows.rows_in_use,
            "rows_capacity": self.rows.capacity,
            "results_held": self.records.clients,
            "edited_tokens": edited,
            "skipped_tokens": skipped,
            "op_seconds": counters.op_seconds,
        }
        counters.edited_tokens = counters.skipped_tokens = 0
        counters.op_seconds = 0.0
        return stats

    def _kernel_path(self, kernel: Kernel, table: EditTable, is_special: Tensor) -> KernelPath:
        step, device = self.step, self.prompt_len.device
        report_f = torch.zeros(step.token_slot.shape[0], MAX_INTERVENTIONS, device=device)
        reports = torch.zeros(self.prompt_len.shape[0], dtype=torch.int32, device=device)
        buffers = Buffers(
            step.token_slot,
            step.positions,
            step.input_ids,
            is_special,
            self.prompt_len,
            table,
            self.rows,
            report_f,
            reports,
            self._touched,
        )
        return KernelPath(kernel.bound(buffers), report_f, reports)

    def _latents(self, plan: SteeringPlan) -> list[tuple[int, int]]:
        """The rows that this worker needs of a plan."""
        return sorted(latent for latent in plan.latents if latent[0] in self._owned_saes)
