"""vLLM's real app with our plugin on it, over handlers that answer without an engine."""

from __future__ import annotations

import functools
import json
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import (
    ResponseCompletedEvent,
    ResponseCreatedEvent,
    ResponsesResponse,
)
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from server.plugin import SteeringEndpointPlugin
from steering.config import SteeringConfig
from steering.report import Summary
from steering.request.accepted import Accepted
from steering.request.plan import SteeringPlan
from steering.vllm.door import catalog_for, complete, plan_of

#: As vLLM hands every prompt to its engine here.
PROMPT = {"type": "token", "prompt_token_ids": [7, 8, 9]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
HEAD = {"id": "chatcmpl-7", "object": "chat.completion.chunk", "created": 11, "model": "tiny"}
CHOICE = {"index": 0, "delta": {"content": "hi"}, "text": "hi"}
ENTRY = {
    "sae": "a",
    "feature": 5,
    "op": "clamp",
    "value": 1.0,
    "effective_value": 1.0,
    "tokens_edited": 4,
    "tokens_skipped": 0,
    "tokens_active": 1,
    "mean_activation": 0.25,
    "max_activation": 1.0,
}
#: What a worker tells of it.
FIGURES = {key: ENTRY[key] for key in list(ENTRY)[5:]}
READ = {
    "sae": "a",
    "tokens": [
        {"position": 1, "id": 8, "text": "x", "phase": "prompt", "features": [[3, 2.0], [8, 1.0]]}
    ],
}
READ_BYTES = [
    np.array([1], np.int64).tobytes(),
    np.array([3, 8], np.int32).tobytes(),
    np.array([2, 1], np.float32).tobytes(),
]


class Recorder:
    """What the handlers saw, and how they are to answer."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.requests: list[Any] = []
        self.error: BaseException | None = None
        self.error_response: Any = None
        self.break_stream = False
        self.turns = 1
        self.open_streams = 0

    @property
    def extra_args(self) -> dict[str, Any]:
        """The extra arguments of the only request, as the engine was handed them."""
        (params,) = self.engine.params
        return dict(params.extra_args or {})

    @property
    def accepted(self) -> Accepted:
        """What was accepted of it."""
        accepted = self.extra_args["steering"]
        assert isinstance(accepted, Accepted)
        return accepted

    def see(self, request: Any) -> None:
        """Take note of one of vLLM's four kinds of requests, and fail if told to."""
        self.requests.append(request)
        if self.error is not None:
            raise self.error

    async def run(self, request: Any, generate: Callable[..., Any] | None = None) -> Any:
        """Do with a request what its handler does with the engine.

        Args:
            request: one of vLLM's four kinds.
            generate: what begins it, if not the engine itself.

        Returns:
            The sampling parameters.
        """
        params = request.to_sampling_params(5, {})
        if generate is None:
            outputs = self.engine.generate(PROMPT, params, "1")
        else:
            outputs = generate(engine_input=PROMPT, sampling_params=params)
        self.see(request)
        async for _ in outputs:
            pass
        return params

    async def chunks(self, head: dict[str, Any], usage: bool) -> AsyncGenerator[str, None]:
        """The server-sent events of a completion."""
        self.open_streams += 1
        try:
            yield _data({**head, "choices": [CHOICE]})
            if self.break_stream:
                yield _data({"error": {"message": "broken", "code": 500}})
            elif usage:
                yield _data({**head, "choices": [], "usage": USAGE})
            yield "data: [DONE]\n\n"
        finally:
            self.open_streams -= 1


class FakeChat:
    def __init__(self, recorder: Recorder, models: OpenAIServingModels) -> None:
        self.recorder = recorder
        self.models = models

    def unknown(self, request: Any) -> Any:
        """vLLM's answer if there is no such model."""
        if not request.model or self.models.is_base_model(request.model):
            return None
        if request.model in self.models.lora_requests:
            return None
        return create_error_response(
            f"The model `{request.model}` does not exist.", "NotFoundError", HTTPStatus.NOT_FOUND
        )

    def head(self, request: Any) -> dict[str, Any]:
        """How each chunk of its stream begins."""
        return {**HEAD, "model": self.called(request)}

    def called(self, request: Any) -> str:
        """What the response calls the model."""
        name: str = self.models.model_name(self.models.lora_requests.get(request.model))
        return name

    def _maybe_get_adapters(self, request: Any, supports_default_mm_loras: bool = False) -> None:
        """There are none."""

    async def render_chat_request(self, request: Any) -> Any:
        self.recorder.see(request)
        return self.recorder.error_response or ([], [PROMPT])

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        if (unknown := self.unknown(request)) is not None:
            return unknown
        await self.recorder.run(request)
        if self.recorder.error_response is not None:
            return self.recorder.error_response
        if request.stream:
            options = request.stream_options
            return self.recorder.chunks(self.head(request), bool(options and options.include_usage))
        choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}}
        return ChatCompletionResponse(model=self.called(request), choices=[choice], usage=USAGE)


class FakeCompletion(FakeChat):
    async def render_completion_request(self, request: Any) -> Any:
        self.recorder.see(request)
        return self.recorder.error_response or [PROMPT]

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        if (unknown := self.unknown(request)) is not None:
            return unknown
        prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        for _ in prompts:
            await self.recorder.run(request)
        if request.stream:
            return self.recorder.chunks({**self.head(request), "object": "text_completion"}, False)
        choice = {"index": 0, "text": "hi"}
        return CompletionResponse(model=self.called(request), choices=[choice], usage=USAGE)


class FakeResponses(FakeChat):
    async def create_responses(self, request: Any, raw_request: Any = None) -> Any:
        if (unknown := self.unknown(request)) is not None:
            return unknown
        params = await self.recorder.run(request, self._generate_with_builtin_tools)
        name = self.called(request)
        if request.stream:
            return self._events(request, params, name)
        return self._response(request, params, name)

    async def _generate_with_builtin_tools(
        self, *, engine_input: Any, sampling_params: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's asks the engine once for each turn, with the same parameters."""
        for turn in range(self.recorder.turns):
            name = f"1_{turn}"
            async for output in self.recorder.engine.generate(engine_input, sampling_params, name):
                yield output

    async def _events(self, request: Any, params: Any, name: str) -> AsyncGenerator[Any, None]:
        for kind, event in (
            ("created", ResponseCreatedEvent),
            ("completed", ResponseCompletedEvent),
        ):
            yield event(
                type=f"response.{kind}",
                sequence_number=0,
                response=self._response(request, params, name),
            )

    def _response(self, request: Any, params: Any, name: str) -> Any:
        return ResponsesResponse.from_request(
            request, params, model_name=name, created_time=1, output=[], status="completed"
        )


class FakeMessages(FakeChat, AnthropicServingMessages):
    """vLLM's own conversions between the two APIs, around a chat that needs no engine."""

    _merge_inline_system = False


class FakeEngine:
    """An engine client without an engine: vLLM's own `generate` and our door, and made-up tokens.

    Every choice has two tokens. Its worker finds `ENTRY`'s figures for each edit, and reads `READ`.
    """

    log_requests = False
    dead_error = EngineDeadError()

    def __init__(self, config: SteeringConfig | None, model_config: Any = None) -> None:
        additional = {} if config is None else {"steering": config.to_dict()}
        self.vllm_config = SimpleNamespace(
            additional_config=additional,
            model_config=SimpleNamespace(max_model_len=256),
            parallel_config=SimpleNamespace(pipeline_parallel_size=1),
            scheduler_config=SimpleNamespace(
                max_num_batched_tokens=256, max_num_queued_reqs=None, max_num_queued_tokens=None
            ),
            device_config=SimpleNamespace(device_type="cpu"),
            speculative_config=None,
            kv_transfer_config=None,
        )
        self.model_config = model_config or SimpleNamespace(
            model="/nowhere", revision=None, max_model_len=256
        )
        self.renderer = FakeRenderer()
        self.input_processor = None
        self.engine_core = self
        self.core_engines = ["0"]
        self.stats: list[dict[str, float]] = []
        self.errored = False
        #: What `generate` was called with.
        self.params: list[Any] = []
        self.prompts: list[Any] = []
        self.priorities: list[int] = []
        #: What the door made of it, until the results are fetched.
        self.plans: dict[str, SteeringPlan] = {}
        self.aborted: list[str] = []

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing runs."""

    def get_num_unfinished_requests(self) -> int:
        return 0

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(decode=lambda ids: "x")

    def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        outputs: AsyncGenerator[Any, None] = AsyncLLM.generate(self, *args, **kwargs)
        return outputs

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *, priority: int = 0, **options: Any
    ) -> FakeCollector:
        """What `AsyncLLM.add_request` and the engine behind it do."""
        self.params.append(params)
        self.prompts.append(prompt)
        self.priorities.append(priority)
        request = SimpleNamespace(
            request_id=request_id,
            sampling_params=params.clone(),
            prompt_token_ids=list(prompt["prompt_token_ids"]),
            prompt_embeds=None,
            resumable=False,
            cache_salt=prompt.get("cache_salt"),
        )
        complete(request, catalog_for(self.vllm_config))
        msgspec.msgpack.encode(request.sampling_params.extra_args)
        if (plan := plan_of(request.sampling_params)) is not None and plan.wants_results:
            self.plans[plan.key] = plan
        return FakeCollector(request_id, request.prompt_token_ids, params.n)

    async def abort(self, request_id: str, internal: bool = False) -> None:
        self.aborted.append(request_id)

    async def call_utility_all_async(self, *call: Any) -> list[list[dict[str, float]]]:
        assert call[1] == "steering_take_stats"
        return [[self.stats.pop(0) if self.stats else {}]]

    async def _call_utility_async(
        self, method: str, key: str, limits: dict[int, int], engine: str
    ) -> list[list[dict[str, Any]]]:
        assert (method, engine) == ("steering_take_results", "0")
        if (plan := self.plans.pop(key, None)) is None:
            return [[]]
        return [[self.summary(plan, child).to_wire() for child in limits]]

    def summary(self, plan: SteeringPlan, child: int) -> Summary:
        """What a worker would have recorded of a choice."""
        return Summary(
            child=child,
            cached=2,
            edits=[FIGURES] * len(plan.edits),
            read=None if plan.read is None else READ_BYTES,
            aggregate=[[3, 2.0], [8, 1.0]],
        )


class FakeRenderer:
    """A renderer whose tokens are the bytes of a text, after one special token."""

    tokenizer = None
    model_config = SimpleNamespace(max_model_len=256)

    class default_cmpl_tok_params:
        """vLLM's `TokenizeParams`."""

        @staticmethod
        def with_kwargs(**given: bool) -> dict[str, bool]:
            return given

    async def tokenize_prompt_async(
        self, prompt: Mapping[str, str], params: Mapping[str, bool]
    ) -> dict[str, list[int]]:
        special = [1] if params["add_special_tokens"] else []
        return {"prompt_token_ids": special + list(prompt["prompt"].encode())}

    def validate_token_ids(self, token_ids: Sequence[int]) -> None:
        if max(token_ids) >= 320:
            raise ValueError(f"Token id {max(token_ids)} is out of vocabulary")

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(decode=lambda ids: bytes(ids).decode())


class FakeCollector:
    """Where vLLM's `generate` finds its outputs: here, one."""

    def __init__(self, request_id: str, prompt: list[int], n: int) -> None:
        self.request_id = request_id
        choices = [CompletionOutput(i, "hi", [5, 6], None, None) for i in range(n)]
        self._output = RequestOutput(request_id, None, prompt, None, choices, finished=True)

    def get_nowait(self) -> RequestOutput:
        return self._output

    def close(self) -> None:
        """Nothing is open."""


@functools.cache
def _parser() -> Any:
    return make_arg_parser(FlexibleArgumentParser())


def serve_args(*flags: str) -> Namespace:
    """vLLM's flags, parsed."""
    args: Namespace = _parser().parse_args(["tiny", *flags])
    return args


async def make_app(
    config: SteeringConfig | None,
    *flags: str,
    engine: FakeEngine | None = None,
    max_body_bytes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[FastAPI, Recorder]:
    """The app that `vllm serve FLAGS` builds, its plugins already restricted to ours."""
    args = serve_args(*flags)
    if max_body_bytes is not None:
        args.steering_max_body_bytes = max_body_bytes
    for name, value in (options or {}).items():
        setattr(args, name, value)
    app = build_app(args, ("generate",), None)
    engine = engine or FakeEngine(config)
    recorder = Recorder(engine)
    state = app.state
    models = OpenAIServingModels(engine, [BaseModelPath("tiny", "/nowhere")])
    state.openai_serving_models = models
    state.openai_serving_chat = FakeChat(recorder, models)
    state.openai_serving_completion = FakeCompletion(recorder, models)
    state.openai_serving_responses = FakeResponses(recorder, models)
    state.anthropic_serving_messages = FakeMessages(recorder, models)
    (plugin,) = state.endpoint_plugins
    assert isinstance(plugin, SteeringEndpointPlugin)
    await plugin.init_state(engine, state, args)
    return app, recorder


def _data(content: object) -> str:
    return f"data: {json.dumps(content)}\n\n"
