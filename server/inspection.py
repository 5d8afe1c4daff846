"""The body of POST /v1/saes/{sae}/inspect: a text, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from server.protocol import SteerableChatCompletionRequest, SteerableCompletionRequest
from steering.errors import SteeringError
from steering.request import plan
from steering.request.limits import DEFAULT_TOP_K, MAX_TOP_K
from steering.request.shape_errors import shown, wrong_type

AGGREGATES: Final = ("max", "mean", "frequency")

INSPECT_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "title": "InspectRequest",
    "properties": {
        "messages": {
            "type": ["array", "null"],
            "items": {"type": "object"},
            "description": "A conversation, as for chat completions. Either this or `prompt`.",
        },
        "prompt": {
            "type": ["string", "array", "null"],
            "items": {"type": "integer", "minimum": 0},
            "description": "A text, or its token ids. Either this or `messages`.",
        },
        "model": {"type": ["string", "null"], "description": "As for completions, a LoRA's name."},
        "top_k": {
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": MAX_TOP_K,
            "description": f"Features of each token and of the text (default {DEFAULT_TOP_K}).",
        },
        "aggregate": {
            "type": ["string", "null"],
            "enum": [*AGGREGATES, None],
            "description": "How a feature scores over the text (default max).",
        },
        "special_tokens": {
            "type": ["boolean", "null"],
            "description": "Let special tokens and the first token take part (default false).",
        },
    },
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Inspection:
    """A validated body. Exactly one of `messages` and `prompt` is given."""

    sae: str
    messages: list[Any] | None
    prompt: str | list[int] | None
    model: str | None
    top_k: int
    aggregate: str
    special_tokens: bool

    @classmethod
    def parse(cls, sae: str, body: object) -> Inspection:
        """Validate a body strictly, as the `steering` field is.

        Raises:
            SteeringError: with the code and path of the error table.
        """
        if not isinstance(body, Mapping):
            raise SteeringError("invalid_type", f"expected an object, got {shown(body)}")
        for key in body:
            if key not in INSPECT_SCHEMA["properties"]:
                known = ", ".join(INSPECT_SCHEMA["properties"])
                raise SteeringError(
                    "unknown_field", f"unknown field {key[:40]!r}; known here: {known}", key[:40]
                )
        messages = _typed(body, "messages", list, "a list")
        prompt = _prompt(body)
        if (messages is None) == (prompt is None):
            raise SteeringError(
                "invalid_value",
                "give either messages or prompt",
                "messages" if messages is None else "prompt",
            )
        for key, value in (("messages", messages), ("prompt", prompt)):
            if value is not None and not value:
                raise SteeringError("invalid_value", f"{key} is empty: nothing to read", key)
        top_k = _typed(body, "top_k", int, "an integer", DEFAULT_TOP_K)
        if not 1 <= top_k <= MAX_TOP_K:
            raise SteeringError(
                "invalid_value", f"top_k {shown(top_k)} not in [1, {MAX_TOP_K}]", "top_k"
            )
        aggregate = _typed(body, "aggregate", str, "a string", AGGREGATES[0])
        if aggregate not in AGGREGATES:
            raise SteeringError(
                "invalid_value",
                f"aggregate {aggregate[:40]!r} is not one of {', '.join(AGGREGATES)}",
                "aggregate",
            )
        return cls(
            sae=sae,
            messages=messages,
            prompt=prompt,
            model=_typed(body, "model", str, "a string"),
            top_k=top_k,
            aggregate=aggregate,
            special_tokens=_typed(body, "special_tokens", bool, "true or false", False),
        )

    def steering(self) -> dict[str, Any]:
        """The `steering` field that reads the prompt."""
        return {
            "positions": {"generation": False, "special_tokens": self.special_tokens},
            "read": {"sae": self.sae, "top_k": self.top_k},
        }

    def how(self) -> plan.Inspection:
        """What the engine must know beside the read."""
        return plan.Inspection(self.aggregate, self.special_tokens)

    def to_request(self) -> SteerableChatCompletionRequest | SteerableCompletionRequest:
        """The request as which the text is rendered.

        Raises:
            pydantic.ValidationError: if the messages are not what vLLM takes.
        """
        common = {"model": self.model, "max_tokens": 1, "steering": self.steering()}
        if self.messages is None:
            return SteerableCompletionRequest(prompt=self.prompt, **common)
        return SteerableChatCompletionRequest(
            messages=self.messages, add_generation_prompt=False, **common
        )


def _prompt(body: Mapping[str, Any]) -> str | list[int] | None:
    """One text, or the ids of one. vLLM, which knows the vocabulary, refuses ids past its end."""
    value = body.get("prompt")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise wrong_type(value, "a string or a list of token ids", "prompt")
    if value and min(value) < 0:
        raise SteeringError(
            "invalid_value", f"token id {str(min(value))[:40]} is negative", "prompt"
        )
    return value


def _typed(body: Mapping[str, Any], key: str, kind: type, name: str, default: Any = None) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong_type(value, name, key)
    return value
