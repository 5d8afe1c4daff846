"""A server that speculates answers what one that does not answers: tools and structured output,
steered and not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.demo_sae import ELVES
from tests.engine import server
from tests.engine.server import LiveServer
from tests.engine.speculative import SPECULATIVE

pytest_plugins = ("tests.engine.server",)
# The first test to ask waits for two servers.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Harder, a model of this size stays in its JSON's white space.
MILDLY: Final = {"sae": "l14", "feature": ELVES, "op": "clamp", "value": 0.5, "unit": "max_act"}
STEERED: Final = {"interventions": [MILDLY], "report": True}
WEATHER: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Oslo"]},
                "days": {"type": "array", "items": {"enum": ["today", "tomorrow"]}, "maxItems": 2},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
SCHEMA: Final = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad"]},
        "sunny": {"type": "boolean"},
        "moods": {"type": "array", "items": {"enum": ["good", "bad"]}, "maxItems": 4},
    },
    "required": ["mood", "sunny", "moods"],
    "additionalProperties": False,
}
FORMAT: Final = {
    "type": "json_schema",
    "json_schema": {"name": "day", "schema": SCHEMA, "strict": True},
}
#: Where the answer's form is certain: its members.
MEMBERS: Final = {
    "json_schema": {"mood", "sunny", "moods"},
    "named tool": {"city", "days"},
    "required tool": {"city", "days"},
}
NAMED: Final = {"type": "function", "function": {"name": "get_weather"}}
#: What is asked of both servers, by name; each is made of text that repeats itself.
ASKED: Final[dict[str, dict[str, Any]]] = {
    "json_schema": {"response_format": FORMAT},
    "named tool": {"tools": [WEATHER], "tool_choice": NAMED},
    "required tool": {"tools": [WEATHER], "tool_choice": "required"},
    "tool and json_schema": {
        "tools": [WEATHER],
        "tool_choice": "auto",
        "response_format": FORMAT,
    },
    "choice": {"structured_outputs": {"choice": ["good, good, good", "bad, bad, bad"]}},
}


@pytest.fixture(scope="module")
def speculating(
    demo_model: Path, demo_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """SmolLM2 with the demo SAE, speculating."""
    log = tmp_path_factory.mktemp("speculating") / "server.log"
    flags = ("--no-steering-self-check", "--speculative-config", json.dumps(SPECULATIVE))
    with server.serving(demo_model, {"l14": demo_sae}, log, *flags) as running:
        yield running


def ask(asked: LiveServer, name: str, steering: object) -> dict[str, Any]:
    """The whole answer of a request that must succeed."""
    text = (
        'Weather in Paris today and tomorrow: {"mood": "good", "sunny": true, "moods": '
        '["good", "good"]}, {"city": "Paris", "days": ["today", "tomorrow"]}. Say it as JSON.'
    )
    answer = asked.chat(text, steering, max_tokens=80, **ASKED[name])
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def accepted(asked: LiveServer) -> float:
    """Tokens that were proposed and accepted so far."""
    name = "vllm:spec_decode_num_accepted_tokens_total"
    lines = asked.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("steering", [None, STEERED], ids=["plain", "steered"])
def test_answer_is_the_one_without_speculation(
    speculating: LiveServer, live_server: LiveServer, name: str, steering: object
) -> None:
    before = accepted(speculating)
    expected, answer = (ask(asked, name, steering) for asked in (live_server, speculating))
    assert told(answer) == told(expected)
    if steering is not None:
        ours, theirs = (made["steering"]["interventions"][0] for made in (answer, expected))
        assert ours["tokens_edited"] == theirs["tokens_edited"] > 0
        assert ours["tokens_active"] == theirs["tokens_active"]
        assert ours["mean_activation"] == pytest.approx(theirs["mean_activation"], rel=1e-3)
    assert accepted(speculating) > before
    if name in MEMBERS:
        (text,) = told(answer)["calls"] or [{"arguments": told(answer)["content"]}]
        assert json.loads(text["arguments"]).keys() == MEMBERS[name]


def told(answer: dict[str, Any]) -> dict[str, Any]:
    """What a client sees of an answer, but for the ids."""
    (choice,) = answer["choices"]
    calls = choice["message"].get("tool_calls") or []
    return {
        "content": choice["message"]["content"],
        "calls": [call["function"] for call in calls],
        "ended": choice["finish_reason"],
        "tokens": answer["usage"]["completion_tokens"],
    }
