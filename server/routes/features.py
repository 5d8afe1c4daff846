"""The features of an SAE: their labels and statistics, and what one of them is near to."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

from fastapi import APIRouter, Request
from pydantic import WithJsonSchema
from starlette.responses import Response

from sae.feature_search import ORDERS
from server.errors import REFUSALS
from server.json_response import TolerantJSONResponse
from server.models import FeatureDetail, FeatureList, answers
from server.routes.parameters import MAX_DIGITS, feature_index, known_sae, whole_number
from server.state import steering_state
from steering.errors import SteeringError

router = APIRouter(tags=["saes"], responses=REFUSALS)

DEFAULT_LIMIT: Final = 50
MAX_LIMIT: Final = 1000

_Limit = Annotated[
    str | None,
    WithJsonSchema(
        {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
    ),
]
_Offset = Annotated[str | None, WithJsonSchema({"type": "integer", "minimum": 0, "default": 0})]
_Order = Annotated[str | None, WithJsonSchema({"type": "string", "enum": list(ORDERS)})]
_Index = Annotated[str, WithJsonSchema({"type": "integer", "minimum": 0})]


@router.get("/v1/saes/{sae}/features", responses=answers(FeatureList))
async def list_features(
    raw_request: Request,
    sae: str,
    query: str | None = None,
    limit: _Limit = None,
    offset: _Offset = None,
    order: _Order = None,
) -> Response:
    """A page of an SAE's features, in order or those whose labels match a query."""
    state = steering_state(raw_request)
    known_sae(state, sae)
    count = whole_number("limit", limit, DEFAULT_LIMIT, 1, MAX_LIMIT)
    start = whole_number("offset", offset, 0, 0, 10**MAX_DIGITS)
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


@router.get("/v1/saes/{sae}/features/{feature}", responses=answers(FeatureDetail))
async def get_feature(raw_request: Request, sae: str, feature: _Index) -> Response:
    """One feature, with its examples, what it is near to and what it writes."""
    state = steering_state(raw_request)
    opened = known_sae(state, sae)
    index = feature_index(feature, opened.card.d_sae)
    known = await asyncio.to_thread(state.catalog.features(sae).get, index)
    state.catalog.refuse_changed(sae)
    await asyncio.to_thread(state.catalog.check_row, sae, index, "feature")
    details = await state.details.get(opened, index)
    examples = [{"text": e.text, "activation": e.activation} for e in known.examples]
    return TolerantJSONResponse({**known.to_json(), **details, "examples": examples})
