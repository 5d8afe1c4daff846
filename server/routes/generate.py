"""vLLM's four generating routes, on requests that may carry `steering`.

Each calls vLLM's own route function, so that a request without steering is vLLM's from here on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from vllm.entrypoints.anthropic.api_router import create_messages
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.responses.api_router import create_responses

from server.admission import accept
from server.misplaced import refuse_misplaced_in
from server.presets.models import answering_as
from server.protocol import (
    Steerable,
    SteerableChatCompletionRequest,
    SteerableCompletionRequest,
    SteerableMessagesRequest,
    SteerableResponsesRequest,
)
from server.state import steering_state
from server.streaming import (
    Splice,
    message_events,
    openai_chunks,
    response_events,
    with_report,
)
from steering.errors import SteeringError
from steering.report import Ticket, wants_report
from steering.vllm.door import FIELD, refusal_in, refuse_early

VLLMRoute = Callable[[Any, Request], Awaitable[Response | None]]


async def chat_completions(
    request: SteerableChatCompletionRequest, raw_request: Request
) -> Response | None:
    return await _serve(create_chat_completion, openai_chunks, request, raw_request)


async def completions(request: SteerableCompletionRequest, raw_request: Request) -> Response | None:
    return await _serve(create_completion, openai_chunks, request, raw_request)


async def responses(request: SteerableResponsesRequest, raw_request: Request) -> Response | None:
    return await _serve(create_responses, response_events, request, raw_request)


async def messages(request: SteerableMessagesRequest, raw_request: Request) -> Response | None:
    return await _serve(create_messages, message_events, request, raw_request)


ROUTES: Final[dict[str, Callable[..., Awaitable[Response | None]]]] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/v1/messages": messages,
}


class SteerableRoute(APIRoute):
    """A route whose unreadable bodies are refused as the rest of steering is.

    Well-formed JSON can be too much for the parser: a number of 5000 digits, or 2000 brackets.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            await refuse_misplaced_in(request)
            try:
                return await handler(request)
            except HTTPException as error:
                unreadable = isinstance(error.__cause__, ValueError | RecursionError)
                if not unreadable or b'"steering' not in await request.body():
                    raise
                raise SteeringError(
                    "invalid_value",
                    "the body cannot be read: a number is too long, or it is nested too deeply",
                ) from error

        return answer


def attach(app: FastAPI) -> None:
    """Replace those of the four routes that `app` has; vLLM's documentation of them stays."""
    served = {
        route.path: route
        for route in app.routes
        if isinstance(route, APIRoute) and "POST" in route.methods
    }
    for path, endpoint in ROUTES.items():
        if original := served.get(path):
            app.router.add_api_route(
                path,
                endpoint,
                route_class_override=SteerableRoute,
                methods=["POST"],
                name=original.name,
                tags=original.tags,
                responses=original.responses,
                dependencies=original.dependencies,
                response_model=None,
            )


def refuse_before_streaming(handler: Any, vllm_config: Any) -> None:
    """Let the handler of /v1/responses refuse, before its stream begins, what the engine would.

    The other handlers have called the engine by then; this one calls it only from the stream.
    """
    handler._generate_with_builtin_tools = partial(
        _generate_if_short, handler._generate_with_builtin_tools, vllm_config
    )


def _generate_if_short(
    generate: Callable[..., Any],
    vllm_config: Any,
    *,
    engine_input: Any,
    sampling_params: Any,
    **options: Any,
) -> Any:
    refuse_early(engine_input, sampling_params, vllm_config)
    return generate(engine_input=engine_input, sampling_params=sampling_params, **options)


def carry_through_messages(handler: Any) -> None:
    """Let the handler of /v1/messages take a request's steering into the chat request it builds.

    A refusal there is kept, because vLLM's route would replace it by an error of its own.
    """
    handler.to_chat_completion_request = partial(_convert, handler.to_chat_completion_request)
    handler.create_messages = partial(_keep_refusal, handler.create_messages)


def _convert(convert: Callable[..., Any], request: Any, **options: Any) -> Any:
    chat_request = convert(request, **options)
    if isinstance(request, Steerable) and request.extra_args:
        return SteerableChatCompletionRequest.adopt(chat_request, request.extra_args)
    return chat_request


async def _keep_refusal(
    create: Callable[..., Awaitable[Any]], request: Any, *args: Any, **options: Any
) -> Any:
    try:
        return await create(request, *args, **options)
    except Exception as error:
        if isinstance(request, Steerable):
            request.refusal = refusal_in(error)
        raise


async def _serve(
    route: VLLMRoute, splice: Splice, request: Steerable, raw_request: Request
) -> Response | None:
    state = steering_state(raw_request)
    meant = await state.models.meant(_model(request))
    accepted = await accept(request, state.catalog, meant=meant)
    with answering_as(meant):
        if accepted is None:
            return await _call(route, request, raw_request)
        if not wants_report(accepted.spec):
            request.extra_args[FIELD] = accepted
            return await _call(route, request, raw_request)
        ticket = Ticket(accepted.spec.report, turns=route is create_responses)
        request.extra_args[FIELD] = accepted.reporting_to(ticket)
        return with_report(await _call(route, request, raw_request), ticket, splice)


def _model(request: Any) -> str | None:
    """What a request of any of the four kinds names; empty means the base model."""
    model: str | None = request.model
    return model


async def _call(route: VLLMRoute, request: Steerable, raw_request: Request) -> Response | None:
    """Call a route of vLLM's; a refusal inside the engine comes out as it was raised."""
    try:
        response = await route(request, raw_request)
    except Exception as error:
        if refusal := refusal_in(error):
            raise refusal from None
        raise
    if request.refusal is not None:
        raise request.refusal
    return response
