"""An engine that ends by itself takes the server along, which vLLM then leaves with exit code 0."""

from __future__ import annotations

from threading import Event
from typing import Any

_seen = Event()


class EngineDiedError(Exception):
    """The engine ended while it was meant to run."""


def watch(engine: Any) -> None:
    """Note whether the engine is already dead when vLLM stops it.

    Only the first stop tells: one that was asked for leaves a dead engine too, and is followed by
    another when the server cleans up.
    """
    stop = engine.shutdown

    def shutdown(*args: Any, **kwargs: Any) -> Any:
        engine.shutdown = stop
        if engine.errored:
            _seen.set()
        return stop(*args, **kwargs)

    engine.shutdown = shutdown


def seen() -> bool:
    """Whether a watched engine of this process has ended by itself."""
    return _seen.is_set()
