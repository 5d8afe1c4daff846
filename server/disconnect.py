"""Work for a client that may leave before it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

T = TypeVar("T")


async def unless_disconnected(raw_request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; None if the client leaves first, and then `work` is cancelled.

    The request's body must have been read: whatever else arrives is taken for the client's end.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(raw_request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(raw_request: Request) -> None:
    while (await raw_request.receive())["type"] != "http.disconnect":
        pass
