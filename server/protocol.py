"""vLLM's request types with a `steering` field, and that field's JSON schema.

The field is taken as it came: `Catalog.parse` validates it strictly (7.0 is no feature, true is no
number), which pydantic's coercion would forestall. The schema below is for OpenAPI only.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, Field, PrivateAttr, WithJsonSchema
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from steering.errors import SteeringError
from steering.request.limits import (
    DEFAULT_TOP_K,
    MAX_INTERVENTIONS,
    MAX_TOP_K,
    OPS,
    UNITS,
    VALUE_LIMIT,
)

Schema = dict[str, Any]


def _nullable(kind: str, description: str, **limits: Any) -> Schema:
    return {"type": [kind, "null"], "description": description, **limits}


def _object(properties: Schema, *required: str, nullable: bool = True) -> Schema:
    schema: Schema = {
        "type": ["object", "null"] if nullable else "object",
        "properties": properties,
        "additionalProperties": False,
    }
    return {**schema, "required": list(required)} if required else schema


_POSITIONS: Final = _object(
    {
        "prompt": _nullable("boolean", "Cover tokens of the prompt (default true)."),
        "generation": _nullable("boolean", "Cover tokens after the prompt (default true)."),
        "special_tokens": _nullable(
            "boolean", "Cover special tokens and the first token as well (default false)."
        ),
        "start": _nullable("integer", "First token position, from the prompt's start.", minimum=0),
        "end": _nullable("integer", "Token position to stop before.", minimum=0),
    }
)

_INTERVENTION: Final = _object(
    {
        "sae": _nullable("string", "Name of the SAE; may be left out when one is loaded."),
        "feature": {"type": "integer", "minimum": 0, "description": "Index in [0, d_sae)."},
        "op": {
            "type": "string",
            "enum": list(OPS),
            "description": "clamp f'=v; ablate f'=0; scale f'=v*f; add f'=f+v; floor "
            "f'=max(f,v); cap f'=min(f,v).",
        },
        "value": _nullable(
            "number",
            "Required except for ablate, which takes none.",
            minimum=-VALUE_LIMIT,
            maximum=VALUE_LIMIT,
        ),
        "unit": {
            "type": ["string", "null"],
            "enum": [*UNITS, None],
            "description": "raw, or max_act: times the feature's recorded maximum activation.",
        },
        "positions": _POSITIONS,
    },
    "feature",
    "op",
    nullable=False,
)

STEERING_SCHEMA: Final = {
    **_object(
        {
            "interventions": {
                "type": ["array", "null"],
                "items": _INTERVENTION,
                "maxItems": MAX_INTERVENTIONS,
                "description": "Edits of SAE features, applied at once. At least one, unless "
                "`read` is given.",
            },
            "positions": _POSITIONS,
            "error_term": _nullable(
                "boolean", "Keep what the SAE does not explain (default true)."
            ),
            "report": _nullable("boolean", "Say in the response what was edited (default false)."),
            "read": _object(
                {
                    "sae": _nullable("string", "Name of the SAE; as in an intervention."),
                    "top_k": _nullable(
                        "integer",
                        f"Features per token (default {DEFAULT_TOP_K}).",
                        minimum=1,
                        maximum=MAX_TOP_K,
                    ),
                }
            ),
        }
    ),
    "title": "Steering",
    "description": "Steer this request through features of the SAEs in GET /v1/saes.",
    "examples": [{"interventions": [{"feature": 1234, "op": "clamp", "value": 0}], "report": True}],
}

SteeringField = Annotated[Any, WithJsonSchema(STEERING_SCHEMA)]


class Steerable(BaseModel):
    """A request that can carry a `steering` field to the engine.

    `extra_args` is what goes into the sampling parameters once the request has been admitted;
    `refusal` is what refused it after that, where vLLM's own route would hide it.
    """

    steering: SteeringField = Field(default=None)

    _extra_args: dict[str, Any] = PrivateAttr(default_factory=dict)
    _refusal: SteeringError | None = PrivateAttr(default=None)

    @property
    def extra_args(self) -> dict[str, Any]:
        return self._extra_args

    @property
    def refusal(self) -> SteeringError | None:
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
