"""A running study: in a task of its own, told as server-sent events, ended with its client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError

from server.errors import error_object
from server.metrics import REJECTED
from steering.errors import SteeringError
from steering.studies.progress import Progress

logger = logging.getLogger("vllm.sae.server")

_DONE: Final = "data: [DONE]\n\n"
#: The answer to a study that failed through no fault of its body.
FAILED: Final = {
    "error": {
        "message": "the study failed",
        "type": HTTPStatus.INTERNAL_SERVER_ERROR.phrase,
        "param": None,
        "code": HTTPStatus.INTERNAL_SERVER_ERROR.value,
    }
}

Answer = dict[str, Any]
#: Runs a study that tells its progress.
Work = Callable[[Progress], Awaitable[Answer]]


class RunningStudy:
    """One study, and how far it is.

    Args:
        work: called at once, in a task.
    """

    def __init__(self, work: Work) -> None:
        self._changed = asyncio.Event()
        self._counts: tuple[int, int] | None = None
        self._task = asyncio.ensure_future(self._run(work))

    async def result(self) -> Answer:
        """What the study answers. If this is cancelled, the study ends."""
        try:
            return await self._task
        finally:
            await self.end()

    async def begun(self) -> bool:
        """True once the study runs texts, or is done. If this is cancelled, the study ends.

        Raises:
            SteeringError: if it was refused before.
        """
        try:
            await self._next()
        except asyncio.CancelledError:
            await self.end()
            raise
        if self._counts is None:
            self._task.result()
        return True

    async def end(self) -> None:
        """End the study if it has not ended; its texts leave the engine."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def events(self) -> AsyncGenerator[str, None]:
        """Progress, then the result or what went wrong, then the end."""
        told = None
        while True:
            self._changed.clear()
            ended, counts = self._task.done(), self._counts
            if counts is not None and counts != told:
                told = counts
                yield _event({"object": "steering.progress", "done": told[0], "of": told[1]})
            if ended:
                break
            await self._next()
        try:
            yield _event(self._task.result())
        except SteeringError as error:
            REJECTED.labels(code=error.code).inc()
            yield _event({"error": error_object(error)})
        except VLLMError as error:  # the engine ended, which is told elsewhere, or refused a text
            logger.warning("the engine ended a study: %s", type(error).__name__)
            yield _event(create_error_response(error).model_dump())
        except Exception:  # the response has begun, so there is no status left to tell it
            logger.exception("a study failed")
            yield _event(FAILED)
        yield _DONE

    async def _run(self, work: Work) -> Answer:
        try:
            return await work(Progress(self._tell))
        finally:
            self._changed.set()

    def _tell(self, done: int, of: int) -> None:
        self._counts = (done, of)
        self._changed.set()

    async def _next(self) -> None:
        """Wait until the study is further, or done."""
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({self._task, changed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()


class StudyStream(StreamingResponse):
    """A study's events; the study ends when its client leaves."""

    def __init__(self, running: RunningStudy) -> None:
        super().__init__(running.events(), media_type="text/event-stream")
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._running.end()


def _event(content: object) -> str:
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n"
