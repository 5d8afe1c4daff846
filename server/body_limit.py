"""A limit to the bytes of one request's body, held before they are kept.

Plain ASGI, inside the check of the API key and around everything that reads a body.
"""

from __future__ import annotations

import contextlib

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import refusal
from server.state import SteeringState
from steering.errors import BodyTooLargeError


class BodyLimit:
    """Refuses a body above the limit: by what its head states, or once too much of it has come."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state: SteeringState = scope["app"].state.steering
        limit = state.max_body_bytes
        if limit is None:
            await self.app(scope, receive, send)
            return
        stated = _content_length(scope)
        if stated > limit:
            await _refused(scope, f"{stated}", limit)(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, limit)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            if not exchange.answered:
                raise


class _Exchange:
    """One request and its response, with the body's bytes counted as they come.

    Past the limit the client is answered here. To the app it has gone: there is no more to receive,
    and what is sent goes nowhere. A response that has begun by then goes on.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self.answered = False
        self._scope = scope
        self._receive = receive
        self._send = send
        self._limit = limit
        self._received = 0
        self._responding = False

    async def receive(self) -> Message:
        if self._received > self._limit:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        self._received += len(message.get("body", b""))
        if self._received <= self._limit:
            return message
        if not self._responding:
            self.answered = True
            refused = _refused(self._scope, f"at least {self._received}", self._limit)
            with contextlib.suppress(OSError):  # the client has really gone
                await refused(self._scope, self._receive, self._send)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self.answered:
            self._responding = True
            await self._send(message)


def _content_length(scope: Scope) -> int:
    """The length that the head states; 0 if it states no number, since bytes are counted anyway."""
    try:
        return int(Headers(scope=scope).get("content-length", 0))
    except ValueError:
        return 0


def _refused(scope: Scope, size: str, limit: int) -> Response:
    error = BodyTooLargeError(
        "body_too_large", f"a body of {size} bytes, the limit is {limit} bytes"
    )
    return refusal(scope["path"], error)
