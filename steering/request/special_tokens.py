"""Which tokens edits leave alone unless they are asked not to."""

from __future__ import annotations

from typing import Any


def special_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's special tokens, and the added tokens that it flags special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    flagged = {index for index, token in added.items() if getattr(token, "special", False)}
    return tuple(sorted({*tokenizer.all_special_ids, *flagged}))
