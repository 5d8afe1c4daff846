"""What a text does to the features of an SAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from server.admission import accept
from server.disconnect import unless_disconnected
from server.errors import REFUSALS
from server.inspection import INSPECT_SCHEMA, Inspection
from server.json_response import TolerantJSONResponse
from server.models import InspectAnswer, answers
from server.protocol import SteerableChatCompletionRequest, SteerableCompletionRequest
from server.rendering import rendered
from server.routes.parameters import known_sae
from server.routes.posted import json_body, refuse_to_get
from server.state import SteeringState, steering_state
from steering.errors import SteeringError
from steering.vllm.door import FIELD
from steering.vllm.reader import Finished, Run

router = APIRouter(tags=["saes"], responses=REFUSALS)


@router.post(
    "/v1/saes/{sae:path}/inspect",
    response_model=None,
    responses=answers(InspectAnswer),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": INSPECT_SCHEMA}},
        }
    },
)
async def inspect(raw_request: Request, sae: str) -> Response | None:
    """The strongest features of a text, at each token and over all of it."""
    state = steering_state(raw_request)
    known_sae(state, sae)
    inspection = Inspection.parse(sae, await json_body(raw_request))
    request = _to_request(inspection)
    with _naming_no_steering():
        answer = await unless_disconnected(
            raw_request, _read(state, inspection, request, raw_request)
        )
    if answer is None or isinstance(answer, Response):
        return answer
    report = answer.report
    assert report is not None
    table = state.catalog.features(sae)
    features = [
        {"feature": feature, "score": score, "label": table.label(int(feature))}
        for feature, score in report.aggregate or ()
    ]
    tokens = [] if report.read is None else report.read["tokens"]
    return TolerantJSONResponse({"sae": sae, "tokens": tokens, "features": features})


router.get("/v1/saes/{sae:path}/inspect", include_in_schema=False)(refuse_to_get)


async def _read(
    state: SteeringState,
    inspection: Inspection,
    request: SteerableChatCompletionRequest | SteerableCompletionRequest,
    raw_request: Request,
) -> Finished | Response:
    """Run the text through the engine, or answer as vLLM does if it cannot be rendered."""
    accepted = await accept(request, state.catalog, inspection.how())
    text = await rendered(request, raw_request)
    if isinstance(text, Response):
        return text
    # A client waits for this as for an answer, so it has an answer's priority.
    run = Run(text.prompt, accepted, lora_request=text.lora_request, priority=0)
    return await state.reader.run(run)


def _to_request(
    inspection: Inspection,
) -> SteerableChatCompletionRequest | SteerableCompletionRequest:
    try:
        return inspection.to_request()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = next((str(part) for part in first["loc"]), None)
        raise SteeringError("invalid_value", f"{where}: {first['msg']}"[:500], where) from None


@contextmanager
def _naming_no_steering() -> Iterator[None]:
    """Refuse without a path into the `steering` that a body stands for but does not have."""
    try:
        yield
    except SteeringError as error:
        if error.param is None or not error.param.startswith(FIELD):
            raise
        raise SteeringError(error.code, error.message) from None
