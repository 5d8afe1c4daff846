"""Why a server does not run, in one readable line each."""

from __future__ import annotations

from typing import Final

#: Characters of an exception that the last line shows.
MAX_CAUSE_CHARS: Final = 1000


class RefusedStartError(Exception):
    """The server cannot start as asked; the message is one readable line."""


class EngineStartError(Exception):
    """vLLM's engine could not start; the message is its cause in one line."""


def in_one_line(error: BaseException) -> str:
    """What an exception says, without the line breaks that vLLM and pydantic put into it."""
    said = " ".join(str(error).split())[:MAX_CAUSE_CHARS]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
