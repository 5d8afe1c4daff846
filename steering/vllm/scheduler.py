"""vLLM's scheduler, extended: it holds back requests whose rows would not fit on the device,
computes a text's prompt before its completion if need be, and ends requests by their ``stop_when``.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from steering.config import DEFAULT_MAX_ROWS, SteeringConfig
from steering.report import STOP_REASON
from steering.request.plan import RowKey
from steering.vllm.door import plan_of
from steering.vllm.drain import Unfetched
from steering.vllm.kv_transfer import connects_by_request, guard_transfers, stamp
from steering.vllm.pass_outputs import findings_in
from steering.vllm.streamed_reads import put_rows
from steering.worker.streamed_read import StreamedRead

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class _RowLimits:
    """Scheduler mixin: requests whose features do not fit wait, in the order of vLLM's policy.

    Rows are counted from the moment at which a request enters vLLM's own queue, so whatever vLLM
    decides to run fits. Unsteered requests never wait here.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        config = SteeringConfig.from_additional_config(vllm_config.additional_config)
        self._max_rows = DEFAULT_MAX_ROWS if config is None else config.row_capacity
        self._row_users: Counter[RowKey] = Counter()
        self._rows_of: dict[str, frozenset[RowKey]] = {}
        self._held: dict[str, Request] = {}  # in the order of their arrival
        self._by_priority = vllm_config.scheduler_config.policy == "priority"
        self.unfetched = Unfetched()
        self._gives_by_request = connects_by_request(vllm_config.kv_transfer_config)
        if self._gives_by_request:
            guard_transfers(self)

    def add_request(self, request: Request) -> None:
        plan = plan_of(request.sampling_params)
        if plan is None or not plan.rows or request.request_id in self.requests:  # type: ignore[attr-defined]
            super().add_request(request)  # type: ignore[misc]
            return
        self._held[request.request_id] = request
        self._let_in()

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        if request_ids is None:
            wanted = list(self._held)
        else:
            ids = (request_ids,) if isinstance(request_ids, str) else tuple(request_ids)
            request_ids = ids
            wanted = [r for r in ids if r in self._held]
        dropped = []
        for req_id in wanted:
            request = self._held.pop(req_id)
            request.status = finished_status
            dropped.append(request)
        finished: list[Request] = super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        if dropped:
            self._let_in()
        return finished + dropped

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()  # type: ignore[misc]
        return running, waiting + len(self._held)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._gives_by_request:
            stamp(freed[0], request)
        plan = plan_of(request.sampling_params)
        if plan is not None and plan.wants_results:
            self.unfetched.add(plan.key)
        rows = self._rows_of.pop(request.request_id, None)
        if rows is not None:
            self._row_users.subtract(rows)
            for row in rows:
                if not self._row_users[row]:
                    del self._row_users[row]
            self._let_in()
        return freed

    def _let_in(self) -> None:
        while self._held:
            request = self._next_held()
            req_id = request.request_id
            plan = plan_of(request.sampling_params)
            assert plan is not None
            new_rows = sum(row not in self._row_users for row in plan.rows)
            if len(self._row_users) + new_rows > self._max_rows:
                return
            del self._held[req_id]
            self._row_users.update(plan.rows)
            self._rows_of[req_id] = plan.rows
            super().add_request(request)  # type: ignore[misc]

    def _next_held(self) -> Request:
        held = self._held.values()
        if self._by_priority:
            return min(held)
        return next(iter(held))


class _PromptFirst:
    """Scheduler mixin: a text's prompt and its completion are computed in different passes.

    vLLM's prompt holds both if a text is read. A condition of scope ``prompt`` may be read at a
    later layer than an edit of the completion is made, so it must be known before the edit's pass.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prompt_ends: dict[str, int] = {}

    def add_request(self, request: Request) -> None:
        plan = plan_of(request.sampling_params)
        if plan is not None and plan.prompt_decides and plan.prompt_len < request.num_prompt_tokens:
            self._prompt_ends[request.request_id] = plan.prompt_len
        super().add_request(request)  # type: ignore[misc]

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        ended: list[Request] = super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        for request in ended:
            self._prompt_ends.pop(request.request_id, None)
        return ended

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._prompt_ends.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Cut a pass at the prompt's end: vLLM asks here last how many tokens a request gets."""
        end = self._prompt_ends.get(request.request_id)
        if end is not None and num_computed_tokens < end < num_computed_tokens + num_new_tokens:
            num_new_tokens = end - num_computed_tokens
        given: int = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        return given


class _Findings:
    """Scheduler mixin: a request ends with the token at which its ``stop_when`` fired.

    The pass that fed the token to the model sampled another one, which is dropped. So is what a
    later pass under way samples, since vLLM drops the tokens of every request that has ended. What
    was read for requests that stream it goes with their next output.
    """

    _fired: dict[str, int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read: dict[str, StreamedRead] = {}

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        findings = findings_in(model_runner_output)
        self._fired = findings.fired
        for req_id, part in findings.read.items():
            earlier = self._read.get(req_id)
            self._read[req_id] = part if earlier is None else earlier.followed_by(part)
        updated = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if self._read:
            self._send_reads(updated)
        return updated

    def _send_reads(self, updated: Mapping[int, Any]) -> None:
        for of_client in updated.values():
            for output in of_client.outputs:
                if (part := self._read.pop(output.request_id, None)) is not None:
                    put_rows(output, part)
        # Chunks of a prompt have no output yet, so their rows stay. An aborted request never gets
        # one.
        for req_id in self._read.keys() - self.requests.keys():  # type: ignore[attr-defined]
            del self._read[req_id]

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        # When tokens are computed again after a preemption, the last one of a chunk may not be the
        # request's newest token; then it was judged before.
        if self._fired.get(request.request_id) != request.num_tokens - 1:
            updated: tuple[list[int], bool] = super()._update_request_with_output(  # type: ignore[misc]
                request, new_token_ids, is_stale=is_stale
            )
            return updated
        if request.num_output_placeholders and not is_stale:
            request.num_output_placeholders -= len(new_token_ids)
        request.status = RequestStatus.FINISHED_STOPPED
        request.stop_reason = STOP_REASON
        return [], True


class _SteeringScheduler(_Findings, _PromptFirst, _RowLimits, Scheduler):
    pass


class _SteeringAsyncScheduler(_Findings, _PromptFirst, _RowLimits, AsyncScheduler):
    pass


class SteeringScheduler:
    """Name this as ``scheduler_cls``; it becomes vLLM's sync or async scheduler, as configured."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the scheduler that vLLM would have made, with the additions of this module."""
        asynchronous = vllm_config.scheduler_config.async_scheduling
        chosen = _SteeringAsyncScheduler if asynchronous else _SteeringScheduler
        return chosen(vllm_config, *args, **kwargs)
