"""vLLM's real app with our plugin on it, over handlers that answer without an engine."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.responses.protocol import (
    ResponseCompletedEvent,
    ResponseCreatedEvent,
    ResponsesResponse,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from server.plugin import SteeringEndpointPlugin
from steering.config import SteeringConfig
from steering.vllm import results
from steering.vllm.door import TICKET
from steering.vllm.results import ChoiceResult

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
READ = {
    "sae": "a",
    "tokens": [
        {"position": 1, "id": 9, "text": "x", "phase": "prompt", "features": [[3, 2.0], [8, 1.0]]}
    ],
}


class Recorder:
    """What the handlers saw, and how they are to answer."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.sampling_params: list[Any] = []
        self.requests: list[Any] = []
        self.error: BaseException | None = None
        self.error_response: Any = None
        self.break_stream = False
        self.choices = 1

    @property
    def extra_args(self) -> dict[str, Any]:
        """The extra arguments of the only request."""
        (params,) = self.sampling_params
        return dict(params.extra_args or {})

    @property
    def ticket(self) -> str:
        return str(self.extra_args[TICKET])

    def run(self, request: Any, generate: Callable[..., Any] | None = None) -> None:
        """Do what the engine would with a request, up to its results.

        Args:
            request: one of vLLM's four kinds.
            generate: what begins it, if not the engine itself; nothing iterates what it returns.
        """
        self.requests.append(request)
        params = request.to_sampling_params(5, {})
        self.sampling_params.append(params)
        if generate is None:
            AsyncLLM.generate(self.engine, PROMPT, params, "1")
        else:
            generate(engine_input=PROMPT, sampling_params=params)
        if self.error is not None:
            raise self.error
        if ticket := (params.extra_args or {}).get(TICKET):
            read = READ if params.extra_args["steering"].get("read") else None
            results._tickets[ticket] = [
                [ChoiceResult([ENTRY], read, 2, [[3, 2.0], [8, 1.0]]) for _ in range(self.choices)]
            ]

    async def chunks(self, head: dict[str, Any], usage: bool) -> AsyncGenerator[str, None]:
        """The server-sent events of a completion."""
        yield _data({**head, "choices": [CHOICE]})
        if self.break_stream:
            yield _data({"error": {"message": "broken", "code": 500}})
        elif usage:
            yield _data({**head, "choices": [], "usage": USAGE})
        yield "data: [DONE]\n\n"


class FakeChat:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        self.recorder.run(request)
        if self.recorder.error_response is not None:
            return self.recorder.error_response
        if request.stream:
            options = request.stream_options
            return self.recorder.chunks(HEAD, bool(options and options.include_usage))
        choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}}
        return ChatCompletionResponse(model="tiny", choices=[choice], usage=USAGE)


class FakeCompletion(FakeChat):
    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        self.recorder.run(request)
        if request.stream:
            return self.recorder.chunks({**HEAD, "object": "text_completion"}, False)
        choice = {"index": 0, "text": "hi"}
        return CompletionResponse(model="tiny", choices=[choice], usage=USAGE)


class FakeResponses(FakeChat):
    async def create_responses(self, request: Any, raw_request: Any = None) -> Any:
        self.recorder.run(request, self._generate_with_builtin_tools)
        if request.stream:
            return self._events(request)
        return self._response(request, "completed")

    def _generate_with_builtin_tools(self, *, engine_input: Any, sampling_params: Any) -> None:
        """vLLM's calls the engine only once it is iterated."""

    async def _events(self, request: Any) -> AsyncGenerator[Any, None]:
        for kind, event in (
            ("created", ResponseCreatedEvent),
            ("completed", ResponseCompletedEvent),
        ):
            yield event(
                type=f"response.{kind}",
                sequence_number=0,
                response=self._response(request, "completed"),
            )

    def _response(self, request: Any, status: str) -> Any:
        (params,) = self.recorder.sampling_params
        return ResponsesResponse.from_request(
            request, params, model_name="tiny", created_time=1, output=[], status=status
        )


class FakeMessages(FakeChat, AnthropicServingMessages):
    """vLLM's own conversions between the two APIs, around a chat that needs no engine."""

    _merge_inline_system = False


class FakeEngine:
    """What the plugin asks of an engine client."""

    def __init__(self, config: SteeringConfig | None, model_config: Any = None) -> None:
        additional = {} if config is None else {"steering": config.to_dict()}
        self.vllm_config = SimpleNamespace(
            additional_config=additional, model_config=SimpleNamespace(max_model_len=256)
        )
        self.model_config = model_config or SimpleNamespace(model="/nowhere", revision=None)
        self.renderer = SimpleNamespace(tokenizer=None)
        self.engine_core = self
        self.stats: list[dict[str, float]] = []
        self.errored = False

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing runs."""

    async def call_utility_all_async(self, *call: Any) -> list[list[dict[str, float]]]:
        assert call[1] == "steering_take_stats"
        return [[self.stats.pop(0) if self.stats else {}]]


def serve_args(*flags: str) -> Namespace:
    """vLLM's flags, parsed."""
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(["tiny", *flags])
    return args


async def make_app(
    config: SteeringConfig | None,
    *flags: str,
    engine: FakeEngine | None = None,
    max_body_bytes: int | None = None,
) -> tuple[FastAPI, Recorder]:
    """The app that `vllm serve FLAGS` builds, its plugins already restricted to ours."""
    args = serve_args(*flags)
    if max_body_bytes is not None:
        args.steering_max_body_bytes = max_body_bytes
    app = build_app(args, ("generate",), None)
    engine = engine or FakeEngine(config)
    recorder = Recorder(engine)
    state = app.state
    state.openai_serving_chat = FakeChat(recorder)
    state.openai_serving_completion = FakeCompletion(recorder)
    state.openai_serving_responses = FakeResponses(recorder)
    state.anthropic_serving_messages = FakeMessages(recorder)
    (plugin,) = state.endpoint_plugins
    assert isinstance(plugin, SteeringEndpointPlugin)
    await plugin.init_state(engine, state, args)
    return app, recorder


def _data(content: object) -> str:
    return f"data: {json.dumps(content)}\n\n"
