"""The adapter of model runner V1, which vLLM uses on a CPU, and on CUDA if it does not use V2."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from steering.request.plan import SteeringPlan
from steering.vllm import pass_outputs
from steering.vllm.door import child_index, plan_of
from steering.vllm.pass_positions import FirstPositions
from steering.worker.ops import registered
from steering.worker.worker_state import SteeringState

#: The class whose insides `attach` knows.
RUNNER: Final = ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")


def token_buffers(runner: Any) -> tuple[Tensor, Tensor]:
    """The runner's persistent ``positions`` and ``input_ids``, ``[max_num_tokens]`` on device."""
    return runner.positions, runner.input_ids.gpu


def attach(runner: Any, state: SteeringState) -> None:
    """Follow the runner's requests and bracket its forward passes."""
    update_states = runner._update_states
    model_forward = runner._model_forward
    determine_batch = runner._determine_batch_execution_and_padding
    # Preempted requests keep their plan here while they wait to resume.
    plans: dict[str, SteeringPlan] = {}
    first_positions = FirstPositions()

    def _update_states(scheduler_output: Any) -> Any:
        _follow(scheduler_output, state, plans)
        first_positions.scheduler_output = scheduler_output
        return update_states(scheduler_output)

    def _determine_batch(*args: Any, force_eager: bool = False, **kwargs: Any) -> Any:
        # A full encode allocates memory and decides on the host, so its pass runs outside CUDA
        # graphs.
        full = state.needs_full(runner.input_batch.req_ids)
        return determine_batch(*args, force_eager=force_eager or full, **kwargs)

    def _model_forward(*args: Any, **kwargs: Any) -> Any:
        # The input batch is final here: reordering and condensing are done.
        registered.make_current(state)
        num_reqs = runner.input_batch.num_reqs
        state.begin_step(
            runner.input_batch.req_ids[:num_reqs],
            runner.query_start_loc.np[: num_reqs + 1],
            first_positions,
        )
        try:
            output = model_forward(*args, **kwargs)
            # The output is a tuple if a draft model needs more than the hidden states, and holds no
            # tensor of them except on the last pipeline stage.
            hidden_states = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden_states, Tensor):
                state.captures.put(hidden_states)
            return output
        finally:
            state.end_step()

    runner._update_states = _update_states
    pass_outputs.attach(runner, state)
    runner._model_forward = _model_forward
    runner._determine_batch_execution_and_padding = _determine_batch


def _follow(scheduler_output: Any, state: SteeringState, plans: dict[str, SteeringPlan]) -> None:
    for req_id in scheduler_output.finished_req_ids:
        state.remove_request(req_id)
        plans.pop(req_id, None)
    for req_id in scheduler_output.preempted_req_ids or ():
        state.pause_request(req_id)
    resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
    for req_id in resumed:
        if req_id in plans:
            state.pause_request(req_id)
    for new in scheduler_output.scheduled_new_reqs:
        plan = plan_of(new.sampling_params)
        if plan is not None:
            plans[new.req_id] = plan
            state.add_request(new.req_id, plan, child_index(plan, new.req_id))
    for req_id in resumed:
        if req_id in plans:
            state.add_request(req_id, plans[req_id], child_index(plans[req_id], req_id))
