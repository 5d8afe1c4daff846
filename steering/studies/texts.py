"""The texts of a study: their shape in a body, and what must be known to make tokens of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Protocol

from pydantic import ConfigDict, Field, PlainValidator, Strict, StrictInt, StrictStr, TypeAdapter

from steering.errors import SteeringError
from steering.request.shape import Shape

MAX_TEXTS: Final = 256

_Ids = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Strict()]
_IDS: Final = TypeAdapter(_Ids)
_STRING: Final = TypeAdapter(StrictStr)


def _string_or_ids(raw: Any) -> str | list[int]:
    return _IDS.validate_python(raw) if isinstance(raw, list) else _STRING.validate_python(raw)


#: Told apart by hand: a union of pydantic's would name its members in the path of an error.
StringOrIds = Annotated[
    str | list[int], PlainValidator(_string_or_ids, json_schema_input_type=StrictStr | _Ids)
]


class TextBody(Shape):
    """A text: a conversation or a prompt, and perhaps what follows it."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringText")

    messages: Annotated[list[dict[Any, Any]], Strict()] | None = Field(
        default=None,
        description="A conversation, as for chat completions. Either this or `prompt`.",
    )
    prompt: StringOrIds | None = Field(
        default=None, description="A text, or its token ids. Either this or `messages`."
    )
    completion: StringOrIds | None = Field(
        default=None,
        description="What follows: a text, tokenized by itself without special tokens, or token "
        "ids. Its tokens are generation.",
    )


#: As a member of a body; `study_too_large` if it is too long.
Texts = Annotated[list[TextBody], Strict(), Field(min_length=1, max_length=MAX_TEXTS)]


class Tokens(Protocol):
    """The served model's tokenizer and chat template.

    Attributes:
        max_model_len: tokens of a context.
    """

    @property
    def max_model_len(self) -> int: ...

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool
    ) -> list[int]:
        """A conversation as the model sees it, up to its answer if `generation_prompt`.

        Raises:
            ValueError: if the chat template, or the model, does not take it.
        """
        ...

    async def encode(self, text: str | Sequence[int], *, special_tokens: bool) -> list[int]:
        """The tokens of a text, with those that begin a prompt if `special_tokens`; ids stay ids.

        Raises:
            ValueError: if it is too long, or an id is not in the vocabulary.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...


def check_text(text: TextBody, path: str) -> None:
    """SteeringError unless it has exactly one of messages and prompt, and nothing of it is empty.

    Args:
        text: as parsed.
        path: of the text in the body, "" for the body itself.
    """
    if (text.messages is None) == (text.prompt is None):
        name = "prompt" if text.messages is None else "messages"
        raise SteeringError(
            "invalid_value", "a text needs either messages or prompt", within(path, name)
        )
    for name in ("messages", "prompt", "completion"):
        value = getattr(text, name)
        if value is not None and not value:
            raise SteeringError(
                "invalid_value", f"{name} is empty: there is nothing in it", within(path, name)
            )


def within(path: str, name: str) -> str:
    """The path of a member of what is at `path`, "" for the body itself."""
    return f"{path}.{name}" if path else name
