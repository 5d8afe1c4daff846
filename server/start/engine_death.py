"""What an engine's end means for the server.

If the engine ends by itself, vLLM ends the server with exit code 0, which would hide the failure;
so it is noted here. If the engine is stopped, requests that still run are ended, and nobody is left
waiting.
"""

from __future__ import annotations

import contextlib
from threading import Event
from typing import Any

_seen = Event()


class EngineDiedError(Exception):
    """The engine ended while it was meant to run."""


def watch(engine: Any) -> None:
    """Note whether the engine is already dead when vLLM stops it, and end what it then still runs.

    Only the first stop tells: one that was asked for leaves a dead engine too, and is followed by
    another when the server cleans up.
    """
    stop = engine.shutdown

    def shutdown(*args: Any, **kwargs: Any) -> Any:
        engine.shutdown = stop
        if engine.errored:  # what it ran fails, as vLLM tells its callers itself
            _seen.set()
            return stop(*args, **kwargs)
        try:
            return stop(*args, **kwargs)
        finally:
            _end_requests(engine)

    engine.shutdown = shutdown


def seen() -> bool:
    """Whether a watched engine of this process has ended by itself."""
    return _seen.is_set()


def _end_requests(engine: Any) -> None:
    """Abort what an engine that was stopped has not answered.

    vLLM passes on no more outputs then and tells nobody, so that their clients, and the server with
    them, would wait for as long as the clients have patience.
    """
    handler = engine.output_handler
    if handler is None:  # it never ran anything
        return
    processor = engine.output_processor
    with contextlib.suppress(RuntimeError):  # the loop is closed, and whoever waited is gone
        handler.get_loop().call_soon_threadsafe(
            lambda: processor.abort_requests(list(processor.request_states), internal=True)
        )
