"""Requests that schemathesis makes from a server's own /openapi.json, right ones and wrong ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, urlencode

import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from tests.engine.fuzz_grammar import JSON_HEADERS, Shot
from tests.engine.fuzz_verdict import ROUTES

SAE_ROUTES: Final = "/v1/saes"

#: What multiplies the work of one request. A client may ask for a thousand choices of a thousand
#: tokens; here that would only take long.
_LIMITS: Final = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), 4),
    **dict.fromkeys(("n", "best_of", "min_tokens"), 2),
}
_TOKENS: Final = {"/v1/responses": "max_output_tokens"}


def operations(schema: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Path and method of what is this project's to answer for."""
    return [
        (path, method.upper())
        for path, methods in schema["paths"].items()
        for method in methods
        if path in ROUTES or path.startswith(SAE_ROUTES)
    ]


def openapi_shots(
    schema: Mapping[str, Any], path: str, method: str, model: str, saes: Sequence[str]
) -> st.SearchStrategy[Shot]:
    """Requests to one operation, half of them such as the schema forbids."""
    operation = schemathesis.openapi.from_dict(dict(schema))[path][method]
    right, wrong = (
        operation.as_strategy(generation_mode=mode)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    )
    cases: st.SearchStrategy[Any] = st.one_of(right, wrong)
    names = st.sampled_from([*saes, None])
    return st.builds(_shot, cases, st.just(path), names, st.just(model), st.booleans())


def _shot(case: Any, path: str, sae: str | None, model: str, known_model: bool) -> Shot:
    """A case as it is sent: with limits on its work, and often a model and an SAE that exist."""
    parameters = {**(case.path_parameters or {}), **({"sae": sae} if sae else {})}
    for name, value in parameters.items():
        quoted = quote(str(value), safe="%", errors="surrogatepass")
        path = path.replace(f"{{{name}}}", quoted)
    if isinstance(case.query, Mapping) and case.query:
        path += "?" + urlencode(case.query, doseq=True, errors="surrogatepass")
    body = case.body
    if isinstance(body, Mapping) and path in ROUTES:
        body = {**body, _TOKENS.get(path, "max_tokens"): 2} | _limited(body)
        if known_model:
            body["model"] = model
    if isinstance(body, Mapping) and path.endswith("/rank") and body.get("features") is None:
        body = {**body, "features": [1]}  # not the thousands that have a label
    content = body if isinstance(body, bytes) else b""
    if not isinstance(body, bytes) and type(body).__name__ != "NotSet":
        content = json.dumps(body, default=str).encode()
    return Shot("schemathesis", path, content, case.method, JSON_HEADERS if content else {})


def _limited(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` where every number that multiplies the work is small, and none is left to vLLM."""
    return {
        key: _at_most(_LIMITS[key], value) if key in _LIMITS else value
        for key, value in body.items()
    }


def _at_most(limit: int, value: object) -> object:
    if value is None:
        return limit
    if isinstance(value, int | float) and not isinstance(value, bool):
        return min(value, limit)
    return value
