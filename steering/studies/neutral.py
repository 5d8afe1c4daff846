"""The text that edits are measured on if a study is given none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from steering.errors import SteeringError
from steering.studies.study import Context
from steering.studies.texts import TextBody
from steering.vllm.reader import Text

_FILE: Final = Path(__file__).with_name("neutral.txt")
_SEPARATOR: Final = "\n---\n"


def neutral_passages() -> list[str]:
    """Thirteen short passages of plain English in as many registers, written for this project."""
    return _FILE.read_text(encoding="utf-8").strip().split(_SEPARATOR)


async def neutral_texts(context: Context) -> list[Text]:
    """The passages' tokens; only the beginning of a passage that a short context cannot hold."""
    return [await _beginning(context, passage) for passage in neutral_passages()]


async def texts_of_budget(
    context: Context, given: Sequence[TextBody] | None, path: str
) -> list[Text]:
    """The texts on which the cost of an edit is measured: those of the body, or the passages.

    Args:
        context: the study's context.
        given: the body's texts; None if it has none.
        path: path of their list in the body.

    Raises:
        SteeringError: as `Context.tokens`; ``invalid_value`` if a text has nothing to score.
    """
    if given is None:
        return await neutral_texts(context)
    texts = [await context.tokens(text, f"{path}[{i}]") for i, text in enumerate(given)]
    for i, text in enumerate(texts):
        if text.length == 1:
            raise SteeringError(
                "invalid_value", "a text of one token has nothing to score", f"{path}[{i}]"
            )
    return texts


async def _beginning(context: Context, passage: str) -> Text:
    try:
        return await context.tokens(TextBody(prompt=passage), "")
    except SteeringError:
        words = passage.split(" ")
        if len(words) == 1:
            raise
    return await _beginning(context, " ".join(words[: len(words) // 2]))
