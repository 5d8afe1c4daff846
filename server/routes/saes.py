"""The SAEs that are loaded, their features, and what a text does to them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import APIRouter, Request
from pydantic import ValidationError, WithJsonSchema
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.responses import Response
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.completion.api_router import create_completion

from sae.feature_search import ORDERS
from sae.sae import SAE
from server.admission import admit
from server.errors import REFUSALS, NotFoundError
from server.inspection import INSPECT_SCHEMA, Inspection
from server.json_response import TolerantJSONResponse
from server.routes.generate import call_vllm
from server.state import SteeringState, steering_state
from steering.errors import SteeringError
from steering.vllm import results
from steering.vllm.door import FIELD, TICKET

router = APIRouter(tags=["saes"], responses=REFUSALS)

DEFAULT_LIMIT: Final = 50
MAX_LIMIT: Final = 1000
#: More digits than any index has; Python refuses to convert very long ones.
MAX_DIGITS: Final = 18

# Taken as text and validated here, so that a wrong one is refused in OpenAI's shape.
_Limit = Annotated[
    str | None,
    WithJsonSchema(
        {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
    ),
]
_Offset = Annotated[str | None, WithJsonSchema({"type": "integer", "minimum": 0, "default": 0})]
_Order = Annotated[str | None, WithJsonSchema({"type": "string", "enum": list(ORDERS)})]
_Index = Annotated[str, WithJsonSchema({"type": "integer", "minimum": 0})]


class _AnyName(PathConvertor):
    """Slashes too, but not the last one: a path that ends so is redirected as everywhere else."""

    regex = ".*[^/]"


register_url_convertor("any_name", _AnyName())


@router.get("/v1/saes")
async def list_saes(raw_request: Request) -> Response:
    catalog = steering_state(raw_request).catalog
    data = [catalog.card(name).to_json() for name in catalog.names]
    return TolerantJSONResponse({"object": "list", "data": data})


@router.get("/v1/saes/{sae}/features")
async def list_features(
    raw_request: Request,
    sae: str,
    query: str | None = None,
    limit: _Limit = None,
    offset: _Offset = None,
    order: _Order = None,
) -> Response:
    state = steering_state(raw_request)
    _known(state, sae)
    count = _number("limit", limit, DEFAULT_LIMIT, 1, MAX_LIMIT)
    start = _number("offset", offset, 0, 0, 10**MAX_DIGITS)
    if order is not None and order not in ORDERS:
        raise SteeringError(
            "invalid_value", f"order {order[:40]!r} is not one of {', '.join(ORDERS)}", "order"
        )
    table = state.catalog.features(sae)
    features, total = await asyncio.to_thread(table.search, query or "", count, start, order)
    return TolerantJSONResponse(
        {
            "object": "list",
            "data": [feature.to_json() for feature in features],
            "total": total,
            "has_more": start + len(features) < total and bool(features),
        }
    )


@router.get("/v1/saes/{sae}/features/{feature}")
async def get_feature(raw_request: Request, sae: str, feature: _Index) -> Response:
    state = steering_state(raw_request)
    opened = _known(state, sae)
    index = _feature(feature, opened.card.d_sae)
    known = await asyncio.to_thread(state.catalog.features(sae).get, index)
    state.catalog.refuse_changed(sae)
    await asyncio.to_thread(state.catalog.check_row, sae, index, "feature")
    details = await state.details.get(opened, index)
    examples = [{"text": e.text, "activation": e.activation} for e in known.examples]
    return TolerantJSONResponse({**known.to_json(), **details, "examples": examples})


@router.post(
    "/v1/saes/{sae:path}/inspect",
    response_model=None,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": INSPECT_SCHEMA}},
        }
    },
)
async def inspect(raw_request: Request, sae: str) -> Response | None:
    state = steering_state(raw_request)
    _known(state, sae)
    inspection = Inspection.parse(sae, await _json(raw_request))
    try:
        request = inspection.to_request()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = next((str(part) for part in first["loc"]), None)
        raise SteeringError("invalid_value", f"{where}: {first['msg']}"[:500], where) from None
    ticket = request.extra_args[TICKET] = results.open_ticket()
    route: Any = create_completion if inspection.messages is None else create_chat_completion
    try:
        with _naming_no_steering():
            await admit(request, state.catalog, inspection.engine_field())
            response = await call_vllm(route, request, raw_request)
        if response is None or response.status_code != HTTPStatus.OK:
            return response
        (result,) = results.take(ticket)
    finally:
        results.discard(ticket)
    table = state.catalog.features(sae)
    features = [
        {"feature": feature, "score": score, "label": table.label(int(feature))}
        for feature, score in result.aggregate or ()
    ]
    tokens = [] if result.read is None else result.read["tokens"]
    return TolerantJSONResponse({"sae": sae, "tokens": tokens, "features": features})


# Without it, /v1/saes/{sae} below would take the last word for part of a name.
@router.get("/v1/saes/{sae:path}/inspect", include_in_schema=False)
async def refuse_to_get_inspect(raw_request: Request, sae: str) -> Response:
    _known(steering_state(raw_request), sae)
    raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": "POST"})


# Last: a name that contains a slash is unknown too.
@router.get("/v1/saes/{sae:any_name}")
async def get_sae(raw_request: Request, sae: str) -> Response:
    return TolerantJSONResponse(_known(steering_state(raw_request), sae).card.to_json())


@contextmanager
def _naming_no_steering() -> Iterator[None]:
    """Refuse without a path into the `steering` that a body stands for but does not have."""
    try:
        yield
    except SteeringError as error:
        if error.param is None or not error.param.startswith(FIELD):
            raise
        raise SteeringError(error.code, error.message) from None


def _known(state: SteeringState, name: str) -> SAE:
    """The SAE of this name. Raises NotFoundError: it stands in the URL's path."""
    try:
        return state.catalog.sae(name)
    except SteeringError as error:
        raise NotFoundError(error.code, error.message, "sae") from None


def _feature(text: str, d_sae: int) -> int:
    if not re.fullmatch(r"-?[0-9]+", text):
        raise SteeringError("invalid_type", f"expected an integer, got {text[:40]!r}", "feature")
    if len(text) > MAX_DIGITS or not 0 <= int(text) < d_sae:
        raise NotFoundError(
            "feature_out_of_range", f"feature {text[:40]} not in [0, {d_sae})", "feature"
        )
    return int(text)


def _number(name: str, text: str | None, default: int, lowest: int, highest: int) -> int:
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]+", text):
        raise SteeringError("invalid_type", f"expected an integer, got {text[:40]!r}", name)
    if len(text) > MAX_DIGITS or not lowest <= int(text) <= highest:
        raise SteeringError(
            "invalid_value", f"{name} {text[:40]} not in [{lowest}, {highest}]", name
        )
    return int(text)


async def _json(raw_request: Request) -> object:
    try:
        return json.loads(await raw_request.body())
    except (ValueError, RecursionError):
        raise SteeringError("invalid_value", "the body is not valid JSON") from None
