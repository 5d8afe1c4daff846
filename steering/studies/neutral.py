"""The text that edits are measured on where a study is given none."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from steering.studies.study import Context
from steering.studies.texts import TextBody
from steering.vllm.reader import Text

_FILE: Final = Path(__file__).with_name("neutral.txt")
_SEPARATOR: Final = "\n---\n"
#: Tokens that a tokenizer may put around a text of its own accord.
_AROUND: Final = 8


def neutral_passages() -> list[str]:
    """Thirteen short passages of plain English in as many registers, written for this project."""
    return _FILE.read_text(encoding="utf-8").strip().split(_SEPARATOR)


async def neutral_texts(context: Context) -> list[Text]:
    """The passages' tokens; what a short context cannot hold of one is left out."""
    room = max(context.vocabulary.max_model_len - _AROUND, 2)
    texts = []
    for passage in neutral_passages():
        ids = context.vocabulary.encode(passage)
        if len(ids) > room:
            passage = context.vocabulary.decode(ids[:room])
        texts.append(await context.tokens(TextBody(prompt=passage), ""))
    return texts
