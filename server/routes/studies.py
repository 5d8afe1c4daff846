"""Studies over HTTP: one route each, from the table of `steering.studies.registry`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response
from vllm.exceptions import VLLMError

from server.disconnect import unless_disconnected
from server.errors import REFUSALS
from server.json_response import TolerantJSONResponse
from server.presets.models import PresetModels
from server.routes.parameters import known_sae
from server.routes.posted import json_body, refuse_to_get
from server.state import steering_state
from server.study_stream import FAILED, RunningStudy, StudyStream
from steering.errors import SteeringError
from steering.studies.registry import STUDIES, Study

logger = logging.getLogger("vllm.sae.server")

router = APIRouter(tags=["studies"], responses=REFUSALS)

_STREAM: Final = "text/event-stream"


def _endpoint(study: Study) -> Callable[..., Awaitable[Response | None]]:
    async def of_texts(raw_request: Request) -> Response | None:
        return await _answer(study, raw_request, None)

    async def of_sae(raw_request: Request, sae: str) -> Response | None:
        known_sae(steering_state(raw_request), sae)
        return await _answer(study, raw_request, sae)

    return of_sae if study.of_sae else of_texts


async def _answer(study: Study, raw_request: Request, sae: str | None) -> Response | None:
    state = steering_state(raw_request)
    body = await json_body(raw_request)
    if isinstance(body, Mapping):
        unknown = _refuse_other_model(state.models, body.get("model"))
        if unknown is not None:
            return unknown
    running = RunningStudy(lambda progress: study.run(state.context(progress), body, sae))
    try:
        if not (isinstance(body, Mapping) and body.get("stream") is True):
            answer = await unless_disconnected(raw_request, running.result())
            return None if answer is None else TolerantJSONResponse(answer)
        # What is refused before anything runs is answered with its status, as without a stream.
        begun = await unless_disconnected(raw_request, running.begun())
        return None if begun is None else StudyStream(running)
    except (SteeringError, VLLMError):
        raise
    except Exception:  # vLLM would answer some with a 400 and their message, and log none
        logger.exception("a study failed")
        return TolerantJSONResponse(FAILED, HTTPStatus.INTERNAL_SERVER_ERROR)


def _refuse_other_model(models: PresetModels, model: object) -> Response | None:
    """Refuse a study of another model than the base; the study refuses what is no string.

    Returns:
        vLLM's answer if there is no model of that name.

    Raises:
        SteeringError: if it is an adapter or a preset.
    """
    if not isinstance(model, str) or models.is_base(model):
        return None
    if models.is_other(model):
        raise SteeringError(
            "invalid_value",
            f"a study runs the base model, {models.base!r}, and {model[:80]!r} is an adapter or a "
            "preset; the body itself says how to steer",
            "model",
        )
    error = {
        "message": f"The model `{model[:200]}` does not exist.",
        "type": "NotFoundError",
        "param": "model",
        "code": HTTPStatus.NOT_FOUND.value,
    }
    return TolerantJSONResponse({"error": error}, HTTPStatus.NOT_FOUND)


def _schema(model: type[BaseModel], mode: Any) -> dict[str, Any]:
    """A model's JSON schema without references: OpenAPI has another place for what they name."""
    schema = model.model_json_schema(mode=mode)
    definitions = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            named = definitions[value["$ref"].rpartition("/")[2]]
            return whole({**named, **{k: v for k, v in value.items() if k != "$ref"}})
        return {key: whole(item) for key, item in value.items()}

    inlined: dict[str, Any] = whole(schema)
    return inlined


def _add(study: Study) -> None:
    path = study.route.replace("{sae}", "{sae:path}")
    content = {"application/json": {"schema": _schema(study.body, "validation")}}
    answer = {
        "application/json": {"schema": _schema(study.answer, "serialization")},
        _STREAM: {"schema": {"type": "string"}},
    }
    router.add_api_route(
        path,
        _endpoint(study),
        methods=["POST"],
        name=study.name,
        summary=study.summary,
        response_model=None,
        responses={200: {"description": study.summary, "content": answer}},
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
    if study.of_sae:
        router.add_api_route(path, refuse_to_get, methods=["GET"], include_in_schema=False)


for _study in STUDIES.values():
    _add(_study)
