"""The tokens that edits leave alone unless they are asked not to."""

from __future__ import annotations

import re
from typing import Any, Final

#: How a model's configuration names the token that stands for an image or a sound.
_PLACEHOLDER: Final = re.compile(r"(image|video|audio)_token_(id|index)|media_placeholder_token_id")


def special_token_ids(tokenizer: Any, config: Any) -> tuple[int, ...]:
    """The tokenizer's special tokens, and the added tokens that it flags special, ascending.

    Args:
        tokenizer: the model's.
        config: the model's configuration. A token that it names as standing for an image or a sound
            is special too, however the tokenizer flags it, since the stream there is not of text.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    flagged = {index for index, token in added.items() if getattr(token, "special", False)}
    placeholders = {
        value
        for name, value in vars(config).items()
        if _PLACEHOLDER.fullmatch(name) and isinstance(value, int) and value >= 0
    }
    return tuple(sorted({*tokenizer.all_special_ids, *flagged, *placeholders}))
