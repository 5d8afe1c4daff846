"""The served model's tokenizer and chat template, as studies use them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

#: A conversation, as chat completions take it.
Messages = Sequence[Mapping[str, Any]]


class Vocabulary(ABC):
    """Turns texts into tokens with vLLM's renderer, which the routes use as well.

    Args:
        renderer: the engine's renderer.
    """

    def __init__(self, renderer: Any) -> None:
        self.renderer = renderer

    @property
    def max_model_len(self) -> int:
        """How many tokens a context has at most."""
        return int(self.renderer.model_config.max_model_len)

    async def chat(self, messages: Messages, *, generation_prompt: bool) -> list[int]:
        """Token ids of a conversation as the model sees it.

        Args:
            messages: the conversation.
            generation_prompt: whether what introduces the model's answer is added.

        Raises:
            ValueError: if the chat template or the model does not accept the conversation, or if it
                holds more than text.
        """
        with _value_errors():
            rendered = await self._rendered(messages, generation_prompt)
            if rendered.get("type") != "token":
                raise ValueError("a text is made of tokens alone: no images, no audio")
            return list(rendered["prompt_token_ids"])

    async def encode(self, text: str | Sequence[int], *, special_tokens: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: the text, or token ids, which stay as they are.
            special_tokens: whether the special tokens that begin or end a prompt are added.

        Raises:
            ValueError: if the text is too long, or an id is not in the vocabulary.
        """
        with _value_errors():
            if not isinstance(text, str):
                self.renderer.validate_token_ids(text)
                return list(text)
            params = self.renderer.default_cmpl_tok_params.with_kwargs(
                add_special_tokens=special_tokens
            )
            made = await self._tokenized({"prompt": text}, params)
            return list(made["prompt_token_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.renderer.get_tokenizer().decode(list(ids)))

    @abstractmethod
    async def _rendered(self, messages: Messages, generation_prompt: bool) -> Mapping[str, Any]:
        """vLLM's engine input for a conversation."""

    @abstractmethod
    async def _tokenized(self, prompt: Mapping[str, str], params: Any) -> Mapping[str, Any]:
        """What the renderer makes of a prompt."""


class OfflineVocabulary(Vocabulary):
    """The vocabulary of a `vllm.LLM`."""

    def __init__(self, llm: Any) -> None:
        super().__init__(llm.renderer)
        self._llm = llm

    async def _rendered(self, messages: Messages, generation_prompt: bool) -> Mapping[str, Any]:
        (made,) = self._llm._preprocess_chat(
            [list(messages)], add_generation_prompt=generation_prompt
        )
        rendered: Mapping[str, Any] = made
        return rendered

    async def _tokenized(self, prompt: Mapping[str, str], params: Any) -> Mapping[str, Any]:
        made: Mapping[str, Any] = self.renderer.tokenize_prompt(dict(prompt), params)
        return made


@contextmanager
def _value_errors() -> Iterator[None]:
    """Turn what vLLM, a tokenizer or a chat template raises for a text into ValueErrors."""
    from jinja2 import TemplateError
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except (VLLMClientError, TemplateError, TypeError, KeyError) as error:
        raise ValueError(str(error)) from error
