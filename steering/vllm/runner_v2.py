"""The adapter of model runner V2, vLLM's default on CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

from steering.vllm import pass_outputs
from steering.vllm.door import child_index, plan_of
from steering.vllm.pass_positions import FirstPositions
from steering.vllm.piecewise import runs_between_pieces
from steering.worker.ops import registered
from steering.worker.worker_state import SteeringState

#: The class whose insides `attach` knows.
RUNNER: Final = ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner")


def token_buffers(runner: Any) -> tuple[Tensor, Tensor]:
    """The runner's persistent ``positions`` and ``input_ids``, ``[max_num_tokens]`` on device."""
    return runner.input_buffers.positions, runner.input_buffers.input_ids


def attach(runner: Any, state: SteeringState) -> None:
    """Follow the runner's requests through its ``ModelState`` and bracket its passes.

    The runner removes a preempted request, and adds it as a new one with its original prompt's
    length when it resumes.
    """
    model_state = runner.model_state
    add_request = model_state.add_request
    preprocess_state = model_state.preprocess_state
    execute_model = runner.execute_model
    first_positions = FirstPositions()

    def _add_request(req_index: int, new_req_data: Any) -> None:
        add_request(req_index, new_req_data)
        plan = plan_of(new_req_data.sampling_params)
        if plan is not None:
            req_id = new_req_data.req_id
            state.add_request(req_id, plan, child_index(plan, req_id))

    def _preprocess_state(input_batch: Any, *args: Any, **kwargs: Any) -> None:
        preprocess_state(input_batch, *args, **kwargs)
        state.begin_step(
            input_batch.req_ids,
            input_batch.query_start_loc_np[: input_batch.num_reqs + 1],
            first_positions,
        )

    def _execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        registered.make_current(state)
        # Not in `ModelState.remove_request`, which does not tell preempted requests from ended ones
        # and is called for a request that resumes, too.
        for req_id in scheduler_output.preempted_req_ids or ():
            state.pause_request(req_id)
        for req_id in scheduler_output.finished_req_ids:
            state.remove_request(req_id)
        first_positions.scheduler_output = scheduler_output
        _full_pass.needed = lambda: state.needs_full(scheduler_output.num_scheduled_tokens)
        try:
            output = execute_model(scheduler_output, *args, **kwargs)
            made = runner.execute_model_state
            if made is not None and made.hidden_states is not None:
                state.captures.put(made.hidden_states)
            return output
        finally:
            # Dummy passes that follow must find nothing to steer.
            state.end_step()
            _full_pass.needed = _never

    model_state.add_request = _add_request
    model_state.preprocess_state = _preprocess_state
    runner.execute_model = _execute_model
    pass_outputs.attach(runner, state)
    _intercept_dispatch()


def _never() -> bool:
    return False


class _FullPass:
    """Whether the pass that is about to be dispatched needs a full encode."""

    needed: Callable[[], bool] = staticmethod(_never)


_full_pass = _FullPass()


@functools.cache
def _intercept_dispatch() -> None:
    """Keep passes with a full encode, which allocates and decides on the host, out of full graphs.

    The runner decides between graphs and eager execution in one imported function. There is no
    other way to influence that from outside.
    """
    from vllm.v1.worker.gpu import model_runner

    model_runner.dispatch_cg_and_sync_dp = _without_full_graphs(
        model_runner.dispatch_cg_and_sync_dp
    )


def _without_full_graphs(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """``dispatch``, but it gives a full pass no graph with the op in it.

    If there are graphs of the pieces between ops, the batch is passed off as one that no full graph
    fits, so that it takes those; so do the other data-parallel ranks, which agree on its shape.
    Else it runs eagerly, and so do they.
    """

    @functools.wraps(dispatch)
    def wrapper(
        manager: Any,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        *args: Any,
        max_query_len: int | None = None,
        need_eager: bool = False,
        **kwargs: Any,
    ) -> Any:
        if _full_pass.needed():
            if runs_between_pieces(manager):
                uniform_token_count = max_query_len = None
            else:
                need_eager = True
        return dispatch(
            manager,
            num_reqs,
            num_tokens,
            uniform_token_count,
            *args,
            max_query_len=max_query_len,
            need_eager=need_eager,
            **kwargs,
        )

    return wrapper
