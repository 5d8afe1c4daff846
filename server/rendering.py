"""Texts as the model sees them: vLLM's own rendering of chats and prompts, without an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from server.protocol import SteerableChatCompletionRequest, SteerableCompletionRequest
from steering.vllm.vocabulary import Messages, Vocabulary


@dataclass(frozen=True)
class Rendered:
    """One text, ready for the engine.

    Attributes:
        prompt: vLLM's engine input.
        lora_request: the adapter that the request's `model` names, None for the model itself.
    """

    prompt: Mapping[str, Any]
    lora_request: Any

    @property
    def token_ids(self) -> list[int]:
        """The text's tokens."""
        return list(self.prompt["prompt_token_ids"])


async def rendered(
    request: SteerableChatCompletionRequest | SteerableCompletionRequest, raw_request: Request
) -> Rendered | Response:
    """Render the only text of a request as the route of its kind would.

    Returns:
        The text; or vLLM's answer if it refuses, as for a model that does not exist.
    """
    state: Any = raw_request.app.state
    is_chat = isinstance(request, SteerableChatCompletionRequest)
    handler = state.openai_serving_chat if is_chat else state.openai_serving_completion
    render = handler.render_chat_request if is_chat else handler.render_completion_request
    result = await render(request)
    if isinstance(result, ErrorResponse):
        return JSONResponse(result.model_dump(), result.error.code)
    (prompt,) = result[1] if is_chat else result
    return Rendered(prompt, handler._maybe_get_adapters(request, supports_default_mm_loras=is_chat))


class ServedVocabulary(Vocabulary):
    """The tokenizer and the chat template as the routes of a server use them.

    Args:
        renderer: the engine client's.
        chat: vLLM's handler of chat completions.
    """

    def __init__(self, renderer: Any, chat: Any) -> None:
        super().__init__(renderer)
        self._chat = chat

    async def _rendered(self, messages: Messages, generation_prompt: bool) -> Mapping[str, Any]:
        try:
            request = SteerableChatCompletionRequest(
                messages=list(messages), add_generation_prompt=generation_prompt, max_tokens=1
            )
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(str(first["msg"])) from None
        result = await self._chat.render_chat_request(request)
        if isinstance(result, ErrorResponse):
            raise ValueError(result.error.message)
        (prompt,) = result[1]
        rendered: Mapping[str, Any] = prompt
        return rendered

    async def _tokenized(self, prompt: Mapping[str, str], params: Any) -> Mapping[str, Any]:
        made: Mapping[str, Any] = await self.renderer.tokenize_prompt_async(dict(prompt), params)
        return made
