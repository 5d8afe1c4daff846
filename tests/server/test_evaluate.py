"""Evaluations over HTTP that are refused, each before anything runs and with its path."""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.server.conftest import StartServer
from tests.server.refusals import refused

EVALUATE: Final = "/v1/steering/evaluate"
EDIT: Final = {"sae": "a", "feature": 5, "op": "clamp", "value": 2.0}
STEERING: Final = {"interventions": [EDIT]}
TEXT: Final = {"prompt": "The weather", "completion": " is cold"}
TALK: Final = {"messages": [{"role": "user", "content": "Hi"}], "completion": " is cold"}
CONTROL: Final = {"name": "control", "steering": {"interventions": []}}
STEERED: Final = {"name": "steered", "steering": STEERING}
SYSTEM: Final = {"name": "system", "system": "Be kind."}
BODY: Final = {"texts": [TEXT], "configurations": [STEERED, CONTROL]}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"texts": []}, ("invalid_value", "texts")),
        ({"texts": [TEXT] * 257}, ("study_too_large", "texts")),
        ({"texts": [{"completion": "b"}]}, ("invalid_value", "texts[0].prompt")),
        ({"texts": [TEXT, {**TEXT, "completion": ""}]}, ("invalid_value", "texts[1].completion")),
        ({"configurations": []}, ("invalid_value", "configurations")),
        ({"configurations": None}, ("invalid_type", "configurations")),
        (
            {"configurations": [{**CONTROL, "name": str(i)} for i in range(17)]},
            ("invalid_value", "configurations"),
        ),
        ({"configurations": [{"name": "a"}]}, ("invalid_value", "configurations[0].steering")),
        (
            {"configurations": [{**STEERED, "system": "b"}]},
            ("invalid_value", "configurations[0].system"),
        ),
        ({"configurations": [STEERED, STEERED]}, ("invalid_value", "configurations[1].name")),
        (
            {"configurations": [{**STEERED, "name": ""}]},
            ("invalid_value", "configurations[0].name"),
        ),
        ({"configurations": [{**STEERED, "name": 5}]}, ("invalid_type", "configurations[0].name")),
        ({"configurations": [{"steering": {}}]}, ("invalid_value", "configurations[0].name")),
        ({"configurations": [{**STEERED, "op": 1}]}, ("unknown_field", "configurations[0].op")),
        (
            {"configurations": [CONTROL, {"name": "b", "steering": 5}]},
            ("invalid_type", "configurations[1].steering"),
        ),
        (
            {
                "configurations": [
                    {"name": "b", "steering": {"interventions": [{**EDIT, "op": "x"}]}}
                ]
            },
            ("invalid_value", "configurations[0].steering.interventions[0].op"),
        ),
        (
            {
                "configurations": [
                    {
                        "name": "b",
                        "steering": {
                            **STEERING,
                            "stop_when": {"sae": "a", "feature": 1, "above": 0},
                        },
                    }
                ]
            },
            ("unsupported_combination", "configurations[0].steering.stop_when"),
        ),
        ({"configurations": [SYSTEM]}, ("invalid_value", "texts[0].prompt")),
        ({"max_tokens": 0}, ("invalid_value", "max_tokens")),
        ({"max_tokens": 64.0}, ("invalid_type", "max_tokens")),
        ({"texts": [{"prompt": "b"}], "max_tokens": 512}, ("invalid_value", "texts[0]")),
        (
            {"texts": [TEXT, {"prompt": "b"}], "interactions": True},
            ("invalid_value", "texts[1].completion"),
        ),
        ({"interactions": 1}, ("invalid_type", "interactions")),
        ({"detail": "yes"}, ("invalid_type", "detail")),
        ({"features": [{"sae": "a"}, {"sae": "c"}]}, ("unknown_sae", "features[1].sae")),
        ({"features": [{}]}, ("sae_required", "features[0].sae")),
        ({"features": [{"sae": "a"}] * 65}, ("invalid_value", "features")),
        ({"features": [{"sae": "a", "top_k": 0}]}, ("invalid_value", "features[0].top_k")),
        ({"features": {"sae": "a"}}, ("invalid_type", "features")),
        ({"features": [{"sae": "a", "k": 1}]}, ("unknown_field", "features[0].k")),
    ],
)
def test_bad_evaluation_is_refused_before_anything_runs(
    start: StartServer, change: dict[str, Any], wanted: tuple[str, str | None]
) -> None:
    server = start(saes={"a": {}, "b": {"seed": 1}})
    for more in ({}, {"stream": True}):
        answer = server.client.post(EVALUATE, json={**BODY, **change, **more})
        assert refused(answer) == wanted
    assert server.recorder.engine.prompts == []


def test_runs_are_reckoned_of_every_configuration_before_any(start: StartServer) -> None:
    # Of 20 tokens: the unsteered run, two configurations, and both edits of the first alone; a
    # control is the second unsteered run. Features are read in the same runs.
    two = {"interventions": [EDIT, {**EDIT, "feature": 6}]}
    body = {
        "texts": [TEXT],
        "configurations": [{"name": "two", "steering": two}, CONTROL],
        "interactions": True,
        "features": [{"sae": "a"}],
    }
    server = start(options={"steering_max_study_tokens": 99})
    answer = server.client.post(EVALUATE, json=body)
    assert refused(answer) == ("study_too_large", None)
    message = answer.json()["error"]["message"]
    assert "100 tokens" in message and "99" in message


def test_answers_are_reckoned_as_long_as_they_may_be(start: StartServer) -> None:
    # 12 tokens and 30: generated, then both sides of it; the shortest is run again.
    server = start(options={"steering_max_study_tokens": 4 * 42 - 1})
    body = {"texts": [{"prompt": "The weather"}], "configurations": [STEERED], "max_tokens": 30}
    answer = server.client.post(EVALUATE, json=body)
    assert refused(answer) == ("study_too_large", None)
    assert "168 tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize("interventions", [None, []])
def test_steering_without_interventions_is_a_control(
    start: StartServer, interventions: list[Any] | None
) -> None:
    server = start(options={"steering_max_study_tokens": 1})
    control = {"name": "a", "steering": {"interventions": interventions, "read": {"sae": "a"}}}
    answer = server.client.post(EVALUATE, json={"texts": [TEXT], "configurations": [control]})
    # 20 tokens twice, and none for noise: a control is what would be run again.
    assert refused(answer) == ("study_too_large", None)
    assert "40 tokens" in answer.json()["error"]["message"]
