"""A request's `steering` is parsed by its route, and by nothing after that."""

from __future__ import annotations

from typing import Any

import pytest

from steering.request import catalog
from steering.request.parse import parse_spec
from tests.server.bodies import MESSAGES
from tests.server.conftest import Server

STEERING = {"interventions": [{"feature": 5, "op": "add", "value": 1}], "report": True, "read": {}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/chat/completions", {"messages": MESSAGES, "n": 3}),
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/completions", {"prompt": ["hi", "ho", "hu"]}),
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5, "model": "tiny"}),
]


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every value that is parsed as a `steering` field."""
    seen: list[object] = []

    def counting(raw: object, saes: Any, **options: Any) -> Any:
        seen.append(raw)
        return parse_spec(raw, saes, **options)

    monkeypatch.setattr(catalog, "parse_spec", counting)
    return seen


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), BODIES)
def test_field_is_parsed_once_on_every_route(
    server: Server, parses: list[object], path: str, body: dict[str, Any], stream: bool
) -> None:
    response = server.client.post(path, json={**body, "steering": STEERING, "stream": stream})
    assert response.status_code == 200
    assert '"interventions"' in response.text
    assert parses == [STEERING]


def test_turns_of_one_conversation_are_parsed_once(server: Server, parses: list[object]) -> None:
    server.recorder.turns = 3
    body = {"input": "hi", "steering": STEERING}
    answer = server.client.post("/v1/responses", json=body).json()
    # The last turn has read all that was written before it.
    assert answer["steering"].keys() == {"interventions", "tokens_cached", "read"}
    assert len(server.recorder.engine.params) == 3
    assert parses == [STEERING]


def test_inspect_parses_once(server: Server, parses: list[object]) -> None:
    assert server.client.post("/v1/saes/a/inspect", json={"prompt": "hi"}).status_code == 200
    assert len(parses) == 1


def test_each_prompt_of_a_completion_has_its_own_results(server: Server) -> None:
    body = {"prompt": ["hi", "ho"], "n": 2, "steering": STEERING}
    choices = server.client.post("/v1/completions", json=body).json()["steering"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert server.recorder.engine.plans == {}
