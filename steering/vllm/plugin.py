"""``vllm.general_plugins`` entry point: runs in every process, changes nothing until asked to."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import Any

_MARK = "_steered_by_vllm_sae"


def register() -> None:
    """Put the door into ``InputProcessor``, result collection into ``AsyncLLM``, patience into
    ``EngineCore`` and attributes of spans into ``OutputProcessor``.

    vLLM may call this several times in a process.
    """
    from vllm.entrypoints.common.offline import OfflineInferenceMixin
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    from steering.vllm.drain import stay_for_results
    from steering.vllm.ignored import refuse_ignored_steering
    from steering.vllm.start_failure import leave_word_of_failure
    from steering.vllm.tracing import describe_spans

    leave_word_of_failure()

    if not hasattr(InputProcessor.process_inputs, _MARK):
        InputProcessor.process_inputs = _admitting(InputProcessor.process_inputs)
        OfflineInferenceMixin._render_and_add_requests = _validating(
            OfflineInferenceMixin._render_and_add_requests
        )
        AsyncLLM.generate = _collecting(AsyncLLM.generate)
        stay_for_results()
        describe_spans()
        refuse_ignored_steering()


def _admitting(process_inputs: Any) -> Any:
    from steering.vllm.door import admit, catalog_for
    from steering.vllm.tracing import is_traced

    @functools.wraps(process_inputs)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        admit(request, catalog_for(self.vllm_config), traced=is_traced(self.vllm_config))
        return request

    setattr(wrapper, _MARK, True)
    return wrapper


def _validating(add_requests: Any) -> Any:
    """Refuse a batch of ``LLM``'s before its first request runs, whichever of them is invalid."""
    from steering.vllm.door import FIELD, catalog_for, refuse_long_results

    @functools.wraps(add_requests)
    def wrapper(self: Any, prompts: Any, params: Any, **kwargs: Any) -> Any:
        vllm_config = self.llm_engine.vllm_config
        long = False
        for one in {id(one): one for one in params}.values():
            extra = getattr(one, "extra_args", None)
            if extra and extra.get(FIELD) is not None:
                catalog = catalog_for(vllm_config)
                spec = catalog.parse(extra[FIELD])
                catalog.prepare_now(spec)
                long = long or spec.report or spec.read is not None
        if long:
            prompts = list(prompts)
            for prompt, one in zip(prompts, params, strict=False):
                refuse_long_results(prompt, one, vllm_config)
        return add_requests(self, prompts, params, **kwargs)

    return wrapper


def _collecting(generate: Any) -> Any:
    from steering.vllm.door import FIELD, catalog_for, refuse_long_results
    from steering.vllm.results import collect, wants_collection

    @functools.wraps(generate)
    def wrapper(
        self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        collects = wants_collection(sampling_params)
        extra = getattr(sampling_params, "extra_args", None) or {}
        if collects:
            refuse_long_results(prompt, sampling_params, self.vllm_config)
        elif extra.get(FIELD) is not None:
            # No server stands before this call, and vLLM wraps what its generator raises.
            catalog = catalog_for(self.vllm_config)
            catalog.prepare_now(catalog.parse(extra[FIELD]))
        outputs: AsyncGenerator[Any, None] = generate(
            self, prompt, sampling_params, request_id, **kwargs
        )
        if collects:
            return collect(self, outputs, sampling_params, request_id)
        return outputs

    return wrapper
