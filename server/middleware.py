"""What must happen before vLLM's own routes see a request.

All are plain ASGI: they read at most the request's body, never the response.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.admission import UNSUPPORTED, refuse_smuggled
from server.errors import refusal
from server.presets.models import presets_mean_base
from server.routes.generate import ROUTES
from server.state import SteeringState
from steering.errors import SteeringError
from steering.request.catalog import Catalog
from steering.request.misplaced import refuse_misplaced
from steering.request.spec import nothing_loaded
from steering.studies.registry import STUDIES
from steering.vllm.door import FIELD


class MetricsRefresh:
    """Fetches the workers' numbers before vLLM answers GET /metrics."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _path(scope) == "/metrics":
            state: SteeringState = scope["app"].state.steering
            if state.worker_series is not None:
                await state.worker_series.refresh()
        await self.app(scope, receive, send)


class PresetNames:
    """Lets the name of a preset stand for the base model's on routes that steer nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _RUNS_UNSTEERED.fullmatch(_path(scope)):
            await self.app(scope, receive, send)
            return
        state: SteeringState = scope["app"].state.steering
        if state.presets is not None:
            await state.presets.catch_up()
        with presets_mean_base():
            await self.app(scope, receive, send)


class ForeignSteering:
    """Refuses `steering` in the body of a route that could only ignore it.

    Embeddings, batches of chats, tokenize and the like drop unknown fields, so a request to steer
    would end in an unsteered answer. Bodies are searched for the key as bytes, and parsed only if
    it is found.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or _steers(_path(scope)):
            await self.app(scope, receive, send)
            return
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        state: SteeringState = scope["app"].state.steering
        try:
            refuse_foreign(body, state.catalog)
            if _path(scope) in GENERATES_ELSEWHERE:
                refuse_unsteered(body, state)
        except SteeringError as error:
            await refusal(_path(scope), error)(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)


def _steers(path: str) -> bool:
    """Whether a route reads `steering` itself, in its own body or inside a study's."""
    # Studies refuse what they do not know, wherever it stands.
    return path in ROUTES or any(study.pattern.fullmatch(path) for study in STUDIES.values())


def refuse_foreign(body: bytes, catalog: Catalog) -> None:
    """Raises SteeringError if a body asks for steering, in its own field or in the engine's."""
    # A zero byte so early is UTF-16 or UTF-32, which JSON parsers take as well.
    if not _MENTIONS_STEERING.search(body) and b"\0" not in body[:4]:
        return
    if _FORM_FIELD.search(body):
        raise _cannot_carry(catalog)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return  # whoever serves this route answers for what is not JSON
    if not isinstance(content, Mapping):
        return
    if content.get(FIELD) is not None:
        raise _cannot_carry(catalog)
    refuse_misplaced(content, any_sae=bool(catalog.names))
    refuse_smuggled(content.get("vllm_xargs"), "vllm_xargs", catalog)
    sampling_params = content.get("sampling_params")
    if isinstance(sampling_params, Mapping):
        refuse_smuggled(sampling_params.get("extra_args"), "sampling_params.extra_args", catalog)


def refuse_unsteered(body: bytes, state: SteeringState) -> None:
    """Raises SteeringError if the default preset ought to steer what a route runs, and cannot."""
    if state.served is None or not state.served.steers_by_default:
        return
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    model = content.get("model") if isinstance(content, Mapping) else None
    if model is None or (isinstance(model, str) and state.served.is_base(model)):
        raise SteeringError(
            UNSUPPORTED,
            "this route cannot steer, and the server steers its model by --steering-default; the "
            f"routes that can are {', '.join(ROUTES)}",
            "model",
        )


def _cannot_carry(catalog: Catalog) -> SteeringError:
    if not catalog.names:
        return nothing_loaded()
    return SteeringError(
        UNSUPPORTED, f"this route cannot steer; the ones that can are {', '.join(ROUTES)}", FIELD
    )


#: Routes of vLLM's that run the model and cannot steer.
GENERATES_ELSEWHERE: Final = frozenset(
    {
        "/cohere/v2/chat",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/chat/completions/batch",
        "/v1/systemone",
    }
)
#: Where a preset's name means the base model: texts are tokenized or read there, not steered; and
#: an adapter may not be loaded under it.
_RUNS_UNSTEERED: Final = re.compile(
    r"/(?:de)?tokenize|/v1/messages/count_tokens|/v1/saes/.+/inspect|/v1/load_lora_adapter"
)


def _either_spelling(text: str) -> str:
    """A pattern for `text` in JSON, where any character may be spelled as an escape."""
    return "".join(rf"(?:{c}|\\u00{ord(c):02x})" for c in text)


_MENTIONS_STEERING: Final = re.compile(f'"{_either_spelling(FIELD)}'.encode(), re.IGNORECASE)
_FORM_FIELD: Final = re.compile(f'; ?name="{FIELD}"'.encode())


def _path(scope: Scope) -> str:
    """The path as routes are matched: without `--root-path`, whether or not a proxy cut it off."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if path == root or path.startswith(f"{root}/"):
        path = path.removeprefix(root)
    return path.rstrip("/")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, then what the client does."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
