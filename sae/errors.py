"""The exception that this package raises for what a user or a file got wrong."""

from __future__ import annotations

import re
from typing import Final

# A terminal's colour codes, which PyTorch, for one, puts into its messages.
_COLOUR: Final = re.compile(r"\x1b\[[0-9;:]*m")


class SAEError(ValueError):
    """One readable line: what the file or the flag says, and what was expected.

    A stranger may have written the file, so characters that a terminal would obey (escape
    sequences, marks that turn the direction of text) are spelled out, and colour codes left out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(_COLOUR.sub("", message).split())
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))
