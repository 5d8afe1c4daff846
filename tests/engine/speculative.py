"""How the tests speculate."""

from __future__ import annotations

from typing import Final

SPECULATIVE: Final = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
