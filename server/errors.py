"""Refusals as HTTP responses, in the shape of the API that was called."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any, Final, get_args

from fastapi import FastAPI, Request
from starlette.responses import Response

from server.json_response import TolerantJSONResponse
from server.metrics import REJECTED
from steering.errors import ErrorCode, SteeringError

logger = logging.getLogger("vllm.sae.server")

INVALID_REQUEST: Final = "invalid_request_error"

_BODY: Final = {
    "type": "object",
    "title": "SteeringErrorResponse",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "const": INVALID_REQUEST},
                "param": {"type": ["string", "null"], "description": "Path of what is wrong."},
                "code": {"type": "string", "enum": list(get_args(ErrorCode))},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
#: What OpenAPI says of refusals.
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status.value: {"description": what, "content": {"application/json": {"schema": _BODY}}}
    for status, what in (
        (HTTPStatus.BAD_REQUEST, "Refused"),
        (HTTPStatus.NOT_FOUND, "A name or an index in the path does not exist"),
    )
}


def install(app: FastAPI) -> None:
    """Answer every `SteeringError` that a route raises."""
    app.add_exception_handler(SteeringError, _answer)


def refusal(path: str, error: SteeringError) -> Response:
    """The response to a refused request, counted and logged. `path` is the URL's."""
    REJECTED.labels(code=error.code).inc()
    logger.info("refused %r: %s", path[:200], error.code)
    details = error_object(error)
    if "/v1/messages" in path:
        return TolerantJSONResponse({"type": "error", "error": details}, error.status)
    return TolerantJSONResponse({"error": details}, error.status)


def error_object(error: SteeringError) -> dict[str, Any]:
    """The object that stands as `error` in an answer."""
    return {
        "message": error.message,
        "type": INVALID_REQUEST,
        "param": error.param,
        "code": error.code,
        **error.details,
    }


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, SteeringError)
    return refusal(request.url.path, error)
