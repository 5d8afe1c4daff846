"""The one exception this package raises for what a caller or a file got wrong."""

from __future__ import annotations

import re
from typing import Final

# Colours and the like, which PyTorch for one puts into its messages.
_TERMINAL_SEQUENCE: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class SAEError(ValueError):
    """One readable line: what the file or the flag says, and what was expected.

    What a file says may be written by a stranger: escape sequences of a terminal are left out, and
    other characters that it would obey (marks that turn the direction of text, say) spelled out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(_TERMINAL_SEQUENCE.sub("", message).split())
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))
