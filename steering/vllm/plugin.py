"""``vllm.general_plugins`` entry point: vLLM runs it in every one of its processes."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering.request.spec import SteeringSpec

_MARK = "_steered_by_vllm_sae"


def register() -> None:
    """Extend vLLM's classes in this process.

    ``InputProcessor`` and ``LLM`` get the door, ``AsyncLLM`` and its client fetch results, an
    ``EngineCore`` stays until they are fetched, ``OutputProcessor`` describes spans and receives
    streamed reads, and vLLM's request types refuse steering that they would ignore. Requests
    without ``steering`` are handled as before. vLLM may call this several times in a process.
    """
    from vllm.entrypoints.common.offline import OfflineInferenceMixin
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    from steering.vllm.drain import stay_for_results
    from steering.vllm.ignored import refuse_ignored_steering
    from steering.vllm.results import remember_engines
    from steering.vllm.start_failure import leave_word_of_failure
    from steering.vllm.streamed_reads import receive_rows
    from steering.vllm.tracing import describe_spans

    leave_word_of_failure()

    if not hasattr(InputProcessor.process_inputs, _MARK):
        InputProcessor.process_inputs = _admitting(InputProcessor.process_inputs)
        OfflineInferenceMixin._render_and_add_requests = _validating(
            OfflineInferenceMixin._render_and_add_requests
        )
        AsyncLLM.generate = _collecting(AsyncLLM.generate)
        stay_for_results()
        remember_engines()
        describe_spans()
        receive_rows()
        refuse_ignored_steering()


def _admitting(process_inputs: Any) -> Any:
    from steering.vllm.door import catalog_for, complete
    from steering.vllm.results import remember_accepted
    from steering.vllm.tracing import is_traced

    @functools.wraps(process_inputs)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        catalog = catalog_for(self.vllm_config)
        accepted = complete(request, catalog, traced=is_traced(self.vllm_config))
        if accepted is not None:
            remember_accepted(self, request.request_id, accepted)
        return request

    setattr(wrapper, _MARK, True)
    return wrapper


def _validating(add_requests: Any) -> Any:
    """Refuse a batch of ``LLM`` before its first request runs if any of them is invalid."""
    from steering.vllm.door import accepted_of, refuse_early, with_accepted

    @functools.wraps(add_requests)
    def wrapper(self: Any, prompts: Any, params: Any, **kwargs: Any) -> Any:
        vllm_config = self.llm_engine.vllm_config
        # Prompts often share their parameters, which are then accepted only once.
        with_field = {id(given): with_accepted(given, vllm_config) for given in params}
        params = [with_field[id(given)] for given in params]
        fields = map(accepted_of, with_field.values())
        if any(accepted is not None and _by_length(accepted.spec) for accepted in fields):
            prompts = list(prompts)
            for prompt, sampling_params in zip(prompts, params, strict=False):
                refuse_early(prompt, sampling_params, vllm_config)
        return add_requests(self, prompts, params, **kwargs)

    return wrapper


def _by_length(spec: SteeringSpec) -> bool:
    """Whether such a request may be refused because of its prompt's length."""
    from steering.report import wants_report

    return wants_report(spec) or spec.relative


def _collecting(generate: Any) -> Any:
    from steering.vllm.door import accepted_of, refuse_early, with_accepted
    from steering.vllm.results import collect

    @functools.wraps(generate)
    def wrapper(
        self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        # Needed if no server stands before this call: vLLM would wrap what its generator raises.
        params = with_accepted(sampling_params, self.vllm_config)
        accepted = accepted_of(params)
        collects = accepted is not None and accepted.ticket is not None
        refuse_early(prompt, params, self.vllm_config)
        outputs: AsyncGenerator[Any, None] = generate(self, prompt, params, request_id, **kwargs)
        return collect(self, outputs, params, request_id) if collects else outputs

    return wrapper
