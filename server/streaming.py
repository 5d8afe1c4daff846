"""The report of a request, added to vLLM's response or to its stream."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from http import HTTPStatus
from typing import Any, Final

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from steering.report import Ticket

FIELD: Final = "steering"
_DATA: Final = "data: "
_DONE: Final = "data: [DONE]"
_ERROR: Final = 'data: {"error"'
_NAMED_DATA: Final = "\ndata: "
_COMPLETED: Final = "response.completed"
_STOP: Final = "message_stop"

Splice = Callable[[AsyncIterable[str], Ticket], AsyncGenerator[str, None]]


class ReportedStream(StreamingResponse):
    """vLLM's stream with the report spliced in, closed however it ends."""

    def __init__(self, original: StreamingResponse, ticket: Ticket, splice: Splice) -> None:
        events: Any = original.body_iterator
        spliced = splice(events, ticket)
        super().__init__(spliced, original.status_code, background=original.background)
        self.raw_headers = original.raw_headers
        self._streams = (spliced, events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # If the client leaves, the generators would end only when they are garbage-collected.
            for stream in self._streams:
                if isinstance(stream, AsyncGenerator):
                    await stream.aclose()


def with_report(response: Response | None, ticket: Ticket, splice: Splice) -> Response | None:
    """`response` with the report added to it. None stands for a client that is gone."""
    if isinstance(response, StreamingResponse):
        return ReportedStream(response, ticket, splice)
    if not isinstance(response, JSONResponse) or response.status_code != HTTPStatus.OK:
        return response
    content = json.loads(bytes(response.body))
    content[FIELD] = ticket.to_json()
    headers = {k: v for k, v in response.headers.items() if not k.startswith("content-")}
    return JSONResponse(content, headers=headers, background=response.background)


async def openai_chunks(events: AsyncIterable[str], ticket: Ticket) -> AsyncGenerator[str, None]:
    """Chat and text completions: a chunk of its own, without choices, just before `[DONE]`.

    What is read as it happens comes with the chunks that carry tokens. Two parts have a chunk of
    their own: the prompt's, before them, and what no chunk of tokens could carry, after them.
    """
    head: dict[str, Any] = {}
    failed = False
    async for event in events:
        failed = failed or event.startswith(_ERROR)
        if not head and not failed and event.startswith("data: {"):
            chunk = json.loads(event.removeprefix(_DATA))
            head = {key: chunk[key] for key in ("id", "object", "created", "model")}
        carries = event.startswith("data: {")
        read = None
        if head and not failed and (carries or event.startswith(_DONE)):
            read = ticket.take_streamed()
        if read is not None:
            if carries and not _of_prompt(read):
                event = f"data: {_dumps({**json.loads(event[len(_DATA) :]), FIELD: read})}\n\n"
            else:
                yield f"data: {_dumps({**head, 'choices': [], FIELD: read})}\n\n"
        if head and not failed and event.startswith(_DONE):
            yield f"data: {_dumps({**head, 'choices': [], FIELD: ticket.to_json()})}\n\n"
        yield event


def _of_prompt(read: dict[str, Any]) -> bool:
    """Whether a chunk's ``steering`` has what was read of the prompt."""
    choices = read.get("choices", (read,))
    return any(choice["read"]["tokens"][0]["phase"] == "prompt" for choice in choices)


async def response_events(events: AsyncIterable[str], ticket: Ticket) -> AsyncGenerator[str, None]:
    """The Responses API: a field of the response inside the event `response.completed`.

    What is read as it happens is a field of the next event, whichever that is: an event of a kind
    of our own would end clients that know the API's alone.
    """
    async for event in events:
        read = None if _is_named(event, "error") else ticket.take_streamed()
        if read is not None:
            event = _with(event, {FIELD: read})
        if _is_named(event, _COMPLETED):
            response = json.loads(event.partition(_NAMED_DATA)[2])["response"]
            event = _with(event, {"response": {**response, FIELD: ticket.to_json()}})
        yield event


async def message_events(events: AsyncIterable[str], ticket: Ticket) -> AsyncGenerator[str, None]:
    """The Messages API: a field of the last event, `message_stop`.

    What is read as it happens is a field of the next event before it, as in `response_events`;
    `message_delta` comes when all of it is known.
    """
    async for event in events:
        if _is_named(event, _STOP):
            event = _with(event, {FIELD: ticket.to_json()})
        elif not _is_named(event, "error") and (read := ticket.take_streamed()) is not None:
            event = _with(event, {FIELD: read})
        yield event


def _is_named(event: str, name: str) -> bool:
    return event.startswith(f"event: {name}\n")


def _with(event: str, fields: dict[str, Any]) -> str:
    """A named event with more fields."""
    name, _, data = event.partition(_NAMED_DATA)
    return f"{name}{_NAMED_DATA}{_dumps({**json.loads(data), **fields})}\n\n"


def _dumps(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
