"""The texts of a study: their shape in a body, and what is needed to turn them into tokens."""

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


#: The alternatives are told apart by hand: pydantic's union would name them in an error's path.
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


#: A list of texts as a member of a body; one that is too long is refused as `study_too_large`.
Texts = Annotated[list[TextBody], Strict(), Field(min_length=1, max_length=MAX_TEXTS)]


class Tokens(Protocol):
    """The served model's tokenizer and chat template.

    Attributes:
        max_model_len: how many tokens a context has.
    """

    @property
    def max_model_len(self) -> int: ...

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool
    ) -> list[int]:
        """The tokens of a conversation as the model sees it.

        Args:
            messages: as for chat completions.
            generation_prompt: whether the tokens that begin the model's answer are added.

        Raises:
            ValueError: if the chat template, or the model, does not take the conversation.
        """
        ...

    async def encode(self, text: str | Sequence[int], *, special_tokens: bool) -> list[int]:
        """The tokens of a text; token ids are returned as they are.

        Args:
            text: a string, or token ids.
            special_tokens: whether the special tokens that begin or end a prompt are added.

        Raises:
            ValueError: if it is too long, or if an id is not in the vocabulary.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...


def check_text(text: TextBody, path: str) -> None:
    """Refuse a text that does not have exactly one of messages and prompt, or has an empty member.

    Args:
        text: the text, as parsed.
        path: the text's path in the body, "" for the body itself.

    Raises:
        SteeringError: ``invalid_value``.
    """
    if (text.messages is None) == (text.prompt is None):
        name = "prompt" if text.messages is None else "messages"
        raise SteeringError(
            "invalid_value", "a text needs either messages or prompt", within(path, name)
        )
    for name in ("messages", "prompt", "completion"):
        value = getattr(text, name)
        if value is not None and not value:
            least = "one message" if name == "messages" else "one token"
            raise SteeringError(
                "invalid_value", f"{name} is empty: give at least {least}", within(path, name)
            )


def within(path: str, name: str) -> str:
    """The path of a member of the object at ``path``, which is "" for the body itself."""
    return f"{path}.{name}" if path else name
