"""Presets over HTTP: list, read, make, replace, delete."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import REFUSALS
from server.json_response import TolerantJSONResponse
from server.presets.preset import MAX_FILE_BYTES
from server.routes.parameters import ANY_NAME
from server.state import steering_state
from steering.errors import SteeringError

_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    **REFUSALS,
    HTTPStatus.FORBIDDEN.value: {
        **REFUSALS[HTTPStatus.BAD_REQUEST.value],
        "description": "Presets, or this one, cannot be changed over HTTP",
    },
}
#: The path of one preset.
_ONE: Final = f"/{{name:{ANY_NAME}}}"
router = APIRouter(prefix="/v1/steering/presets", tags=["presets"], responses=_REFUSALS)

_ENTRY_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "title": "SteeringPreset",
    "properties": {
        "name": {"type": "string", "description": "What a request names as `model`."},
        "object": {"type": "string", "const": "steering.preset"},
        "description": {"type": ["string", "null"]},
        "steering": {"type": "object", "description": "As in the field of a request."},
        "base": {"type": "string", "description": "The model that it steers."},
        "created": {"type": "integer", "description": "Seconds since the epoch."},
    },
    "required": ["name", "object", "description", "steering", "base", "created"],
}
_LIST_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "object": {"type": "string", "const": "list"},
        "data": {"type": "array", "items": _ENTRY_SCHEMA},
    },
    "required": ["object", "data"],
}
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "description": "A `steering` object, or one beside a description.",
                    "type": "object",
                }
            }
        },
    }
}


def _answers(schema: dict[str, Any], *statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": schema}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in statuses
    }


@router.get("", response_model=None, responses=_answers(_LIST_SCHEMA, 200))
async def list_presets(raw_request: Request) -> Response:
    """Every preset, by name."""
    state = steering_state(raw_request)
    presets = await asyncio.to_thread(state.preset_store.all)
    return TolerantJSONResponse(
        {"object": "list", "data": [preset.to_json(state.models.base) for preset in presets]}
    )


@router.get(_ONE, response_model=None, responses=_answers(_ENTRY_SCHEMA, 200))
async def get_preset(raw_request: Request, name: str) -> Response:
    """One preset."""
    state = steering_state(raw_request)
    preset = await asyncio.to_thread(state.preset_store.need, name)
    return TolerantJSONResponse(preset.to_json(state.models.base))


@router.put(
    _ONE, response_model=None, openapi_extra=_BODY, responses=_answers(_ENTRY_SCHEMA, 200, 201)
)
async def put_preset(raw_request: Request, name: str) -> Response:
    """Make a preset, or replace the one of that name."""
    state = steering_state(raw_request)
    body = _parsed(await raw_request.body())
    preset, new = await asyncio.to_thread(state.preset_store.put, name, body)
    status = HTTPStatus.CREATED if new else HTTPStatus.OK
    return TolerantJSONResponse(preset.to_json(state.models.base), status)


@router.delete(_ONE, response_model=None, status_code=HTTPStatus.NO_CONTENT)
async def delete_preset(raw_request: Request, name: str) -> Response:
    """Delete a preset."""
    state = steering_state(raw_request)
    await asyncio.to_thread(state.preset_store.delete, name)
    return Response(status_code=HTTPStatus.NO_CONTENT)


def _parsed(raw: bytes) -> object:
    if len(raw) > MAX_FILE_BYTES:
        raise SteeringError(
            "invalid_value", f"a preset of {len(raw)} bytes, the limit is {MAX_FILE_BYTES}"
        )
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SteeringError("invalid_value", "the body is not JSON") from error
