"""The SAEs that are loaded."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import REFUSALS
from server.json_response import TolerantJSONResponse
from server.models import Card, CardList, answers
from server.routes.parameters import ANY_NAME, known_sae
from server.state import steering_state

router = APIRouter(tags=["saes"], responses=REFUSALS)


@router.get("/v1/saes", responses=answers(CardList))
async def list_saes(raw_request: Request) -> Response:
    """The cards of all loaded SAEs."""
    catalog = steering_state(raw_request).catalog
    data = [catalog.card(name).to_json() for name in catalog.names]
    return TolerantJSONResponse({"object": "list", "data": data})


# After all other routes below /v1/saes: a name that contains a slash is unknown too.
@router.get(f"/v1/saes/{{sae:{ANY_NAME}}}", responses=answers(Card))
async def get_sae(raw_request: Request, sae: str) -> Response:
    """The card of one SAE."""
    return TolerantJSONResponse(known_sae(steering_state(raw_request), sae).card.to_json())
