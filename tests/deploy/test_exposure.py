"""What of the server answers without a key or to another site's page."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import vllm.plugins
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.plugin import SteeringEndpointPlugin
from tests.deploy.conftest import DEPLOY
from tests.server.fakes import Recorder, make_app

#: Prefixes that vLLM's --api-key guards.
GUARDED = ("/v1", "/v2", "/inference", "/cohere")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> tuple[FastAPI, Recorder]:
    monkeypatch.setattr(
        vllm.plugins, "load_endpoint_plugins", lambda tasks: [SteeringEndpointPlugin()]
    )
    return asyncio.run(make_app(None, "--api-key", "sesame", options={"steering_studio": True}))


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route; parameters are filled in."""
    found: list[Any] = list(app.routes)
    return [
        (method, route.path.replace("{sae:path}", "a").replace("{", "").replace("}", ""))
        for route in found
        for method in getattr(route, "methods", None) or ["GET"]
    ]


def test_every_route_below_v1_asks_for_the_key(app: tuple[FastAPI, Recorder]) -> None:
    client = TestClient(app[0])
    guarded = [(method, path) for method, path in routes(app[0]) if path.startswith(GUARDED)]
    assert ("POST", "/v1/chat/completions") in guarded and ("GET", "/v1/saes") in guarded
    for method, path in guarded:
        answer = client.request(method, path, json={}, headers={"authorization": "Bearer wrong"})
        assert answer.status_code == 401, (method, path)


def test_every_route_without_a_key_is_listed_in_the_threat_model(
    app: tuple[FastAPI, Recorder],
) -> None:
    listed = (DEPLOY / "SECURITY.md").read_text(encoding="utf-8")
    open_paths = {path for _, path in routes(app[0]) if not path.startswith(GUARDED)}
    assert [path for path in sorted(open_paths) if f"`{path}`" not in listed] == []


def test_steering_is_refused_where_no_key_is_asked_for(app: tuple[FastAPI, Recorder]) -> None:
    body = {"model": "tiny", "prompt": "x", "steering": {"read": {}}}
    answer = TestClient(app[0]).post("/invocations", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "steering_unavailable"  # this app has no SAE
    assert app[1].requests == []


def test_another_sites_page_may_not_read_an_answer(app: tuple[FastAPI, Recorder]) -> None:
    client = TestClient(app[0])
    origin = {"origin": "http://another.example"}
    assert "access-control-allow-origin" not in client.get("/version", headers=origin).headers
    preflight = client.options(
        "/v1/chat/completions", headers={**origin, "access-control-request-method": "POST"}
    )
    assert preflight.status_code == 400
    assert "access-control-allow-origin" not in preflight.headers
