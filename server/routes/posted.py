"""What routes of one SAE that are only POSTed to have in common."""

from __future__ import annotations

import json
from http import HTTPStatus

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.routes.parameters import known_sae
from server.state import steering_state
from steering.errors import SteeringError


async def json_body(raw_request: Request) -> object:
    """The body's JSON value. Raises SteeringError if it is none."""
    try:
        return json.loads(await raw_request.body())
    except (ValueError, RecursionError):
        raise SteeringError("invalid_value", "the body is not valid JSON") from None


async def refuse_to_get(raw_request: Request, sae: str) -> Response:
    """Answer a GET with 404 or 405. Else /v1/saes/{sae} would take the last word for a name's."""
    known_sae(steering_state(raw_request), sae)
    raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": "POST"})
