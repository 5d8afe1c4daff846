"""vLLM's request types with a `steering` field, and that field's JSON schema.

The field is taken as it comes, and `Catalog.parse` validates it: vLLM's own answer to an error of
pydantic's would have neither our code nor our path. OpenAPI shows the shape that it must have.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, PrivateAttr
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from steering.errors import SteeringError
from steering.request.unvalidated import UnvalidatedSteering

SteeringField = Annotated[Any, UnvalidatedSteering(optional=True)]


class Steerable(BaseModel):
    """A request that can carry a `steering` field to the engine.

    `extra_args` is what goes into the sampling parameters once the request has been admitted;
    `refusal` is what refused it after that, if vLLM's own route would hide it.
    """

    steering: SteeringField = Field(default=None)

    _extra_args: dict[str, Any] = PrivateAttr(default_factory=dict)
    _refusal: SteeringError | None = PrivateAttr(default=None)

    @property
    def extra_args(self) -> dict[str, Any]:
        """What is added to the `extra_args` of the sampling parameters; callers fill it."""
        return self._extra_args

    @property
    def refusal(self) -> SteeringError | None:
        """What refused the request inside vLLM's route; None if nothing did."""
        return self._refusal

    @refusal.setter
    def refusal(self, error: SteeringError | None) -> None:
        self._refusal = error


class _Sampling(Steerable):
    def to_sampling_params(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's sampling parameters, with what steering adds to their `extra_args`."""
        params = super().to_sampling_params(*args, **kwargs)  # type: ignore[misc]
        if self._extra_args:
            params.extra_args = {**(params.extra_args or {}), **self._extra_args}
        return params


# `field_names` caches the fields that vLLM knows of a class; inherited, it would lack ours.


class SteerableChatCompletionRequest(_Sampling, ChatCompletionRequest):
    """POST /v1/chat/completions."""

    field_names = None

    @classmethod
    def adopt(cls, request: Any, extra_args: dict[str, Any]) -> SteerableChatCompletionRequest:
        """A chat request that vLLM built from another API's request, with that one's steering."""
        steerable: SteerableChatCompletionRequest = cls.model_construct(
            request.model_fields_set, **dict(request)
        )
        steerable._extra_args = dict(extra_args)
        return steerable


class SteerableCompletionRequest(_Sampling, CompletionRequest):
    """POST /v1/completions."""

    field_names = None


class SteerableResponsesRequest(_Sampling, ResponsesRequest):
    """POST /v1/responses."""

    field_names = None


class SteerableMessagesRequest(Steerable, AnthropicMessagesRequest):
    """POST /v1/messages. vLLM turns it into a chat request, which carries the steering on."""
