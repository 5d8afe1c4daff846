"""Which tokens edits leave alone unless they are asked not to."""

from __future__ import annotations

import re
from typing import Any, Final

#: What models that take images or sound call the token that stands where their embeddings go.
_PLACEHOLDER: Final = re.compile(r"(image|video|audio)_token_(id|index)|media_placeholder_token_id")


def special_token_ids(tokenizer: Any, config: Any) -> tuple[int, ...]:
    """The tokenizer's special tokens, and the added tokens that it flags special.

    Args:
        tokenizer: the model's.
        config: the model's configuration. Where it names a token that stands for an image or a
            sound, that is special too, however the tokenizer flags it: the stream there is no
            text's.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    flagged = {index for index, token in added.items() if getattr(token, "special", False)}
    placeholders = {
        value
        for name, value in vars(config).items()
        if _PLACEHOLDER.fullmatch(name) and isinstance(value, int) and value >= 0
    }
    return tuple(sorted({*tokenizer.all_special_ids, *flagged, *placeholders}))
