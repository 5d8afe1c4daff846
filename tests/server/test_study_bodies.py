"""Bodies of calibrate, rank and attribute that are refused, and where they are wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server, StartServer
from tests.server.refusals import refused

CALIBRATE = "/v1/steering/calibrate"
RANK = "/v1/saes/a/rank"
ATTRIBUTE = "/v1/saes/a/attribute"
FEATURES = [
    {"index": 5, "label": "snow", "max_activation": 4.0},
    {"index": 6, "label": "rain"},
    {"index": 7, "max_activation": 2.0},
]
EDIT = {"feature": 5, "op": "clamp", "value": 2.0}
STEERING = {"interventions": [EDIT]}
TEXT = {"prompt": "The weather", "completion": " is cold"}
TOKEN_MAX = {"op": "add", "value": 10, "unit": "token_max"}


@pytest.fixture
def labelled(start: StartServer) -> Server:
    return start(saes={"a": {"features": FEATURES}, "k": {"architecture": "topk"}})


def edited(**changes: Any) -> dict[str, Any]:
    return {"steering": {"interventions": [{"sae": "a", **EDIT, **changes}]}}


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ([], ("invalid_type", None)),
        ({}, ("invalid_value", "steering")),
        ({"steering": 1}, ("invalid_type", "steering")),
        ({"steering": {"interventions": []}}, ("invalid_value", "steering.interventions")),
        ({"steering": STEERING}, ("sae_required", "steering.interventions[0].sae")),
        (edited(feature=128), ("feature_out_of_range", "steering.interventions[0].feature")),
        (
            {"steering": {"interventions": [{"sae": "a", "feature": 5, "op": "ablate"}]}},
            ("unsupported_op", "steering.interventions"),
        ),
        (edited(op="cap"), ("unsupported_op", "steering.interventions")),
        (
            {"steering": {**edited()["steering"], "stop_when": {"sae": "a", "feature": 1}}},
            ("invalid_value", "steering.stop_when.above"),
        ),
        ({**edited(), "budget": 0.1}, ("invalid_type", "budget")),
        ({**edited(), "budget": {"value": 0}}, ("invalid_value", "budget.value")),
        ({**edited(), "budget": {"value": "0.1"}}, ("invalid_type", "budget.value")),
        ({**edited(), "budget": {"metric": "ppl"}}, ("invalid_value", "budget.metric")),
        ({**edited(), "budget": {"kl": 1}}, ("unknown_field", "budget.kl")),
        ({**edited(), "texts": []}, ("invalid_value", "texts")),
        ({**edited(), "texts": [TEXT] * 257}, ("study_too_large", "texts")),
        ({**edited(), "texts": [{"prompt": [5]}]}, ("invalid_value", "texts[0]")),
        ({**edited(), "texts": [TEXT, {"prompt": ""}]}, ("invalid_value", "texts[1].prompt")),
        ({**edited(), "texts": [{"prompt": [5] * 250}] * 256}, ("study_too_large", "texts")),
    ],
)
def test_bad_calibration_is_refused_before_anything_runs(
    labelled: Server, body: object, wanted: tuple[str, str | None]
) -> None:
    assert refused(labelled.client.post(CALIBRATE, json=body)) == wanted
    assert labelled.recorder.engine.prompts == []


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (5, ("invalid_type", None)),
        ({"features": []}, ("invalid_value", "features")),
        ({"features": 5}, ("invalid_type", "features")),
        ({"features": [5, 7.0]}, ("invalid_type", "features[1]")),
        ({"features": [5, True]}, ("invalid_type", "features[1]")),
        ({"features": [5, -1]}, ("feature_out_of_range", "features[1]")),
        ({"features": [5, 128]}, ("feature_out_of_range", "features[1]")),
        ({"features": [5, 6]}, ("max_act_unknown", "features[1]")),
        ({"edit": {"op": "add"}}, ("invalid_value", "edit.value")),
        ({"edit": {"op": "clamp", "unit": "raw"}}, ("invalid_value", "edit.value")),
        ({"edit": {"op": "ablate", "value": 0}}, ("invalid_value", "edit.value")),
        ({"edit": {"op": "add", "value": 1e7}}, ("invalid_value", "edit.value")),
        ({"edit": {"op": "add", "value": True}}, ("invalid_type", "edit.value")),
        ({"edit": {"op": "push", "value": 1}}, ("invalid_value", "edit.op")),
        ({"edit": {"op": "add", "value": 1, "unit": "sigma"}}, ("invalid_value", "edit.unit")),
        (
            {"edit": {"op": "scale", "value": 1, "unit": "max_act"}},
            ("invalid_value", "edit.unit"),
        ),
        ({"edit": {**TOKEN_MAX, "op": "clamp"}}, ("invalid_value", "edit.unit")),
        ({"edit": {"op": "ablate", "unit": "token_max"}}, ("invalid_value", "edit.unit")),
        ({"edit": {"op": "ablate", "positions": {}}}, ("unknown_field", "edit.positions")),
        ({"at": "first"}, ("invalid_value", "at")),
        ({"by": "density"}, ("invalid_value", "by")),
        ({"by": "change"}, ("invalid_value", "targets")),
        ({"by": "change", "targets": []}, ("invalid_value", "targets")),
        ({"targets": [" snow", 5]}, ("invalid_type", "targets[1]")),
        ({"targets": [" snow", ""]}, ("invalid_value", "targets[1]")),
        ({"prompt": ""}, ("invalid_value", "prompt")),
        ({"prompt": "a", "messages": []}, ("invalid_value", "messages")),
        ({"prompt": [320]}, ("invalid_value", "prompt")),
        ({"prompt": "a", "completion": "b"}, ("unknown_field", "completion")),
        ({"texts": [TEXT]}, ("unknown_field", "texts")),
        (
            {"features": list(range(128)), "edit": TOKEN_MAX, "prompt": [5] * 256},
            ("invalid_value", None),
        ),
    ],
)
def test_bad_rank_is_refused_before_anything_runs(
    labelled: Server, body: object, wanted: tuple[str, str | None]
) -> None:
    assert refused(labelled.client.post(RANK, json=body)) == wanted
    assert labelled.recorder.engine.prompts == []


def test_targets_that_an_answer_would_repeat_too_often_are_refused(
    labelled: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steering.studies.rank.MAX_ECHOED", 3 * 9 - 1)
    body = {"edit": {"op": "ablate"}, "targets": [" snow", " ice"]}
    answer = labelled.client.post(RANK, json={**body, "features": [5, 7, 9]})
    assert refused(answer) == ("invalid_value", "targets")
    assert "27 characters" in answer.json()["error"]["message"]
    assert labelled.recorder.engine.prompts == []
    answer = labelled.client.post(RANK, json={**body, "features": [5, 5, 7], "prompt": [320]})
    assert refused(answer) == ("invalid_value", "prompt")


def test_rank_without_labels_needs_a_list(labelled: Server) -> None:
    answer = labelled.client.post("/v1/saes/k/rank", json={})
    assert refused(answer) == ("invalid_value", "features")
    assert labelled.recorder.engine.prompts == []


def test_rank_by_tokens_that_the_checkpoint_does_not_show_is_refused(labelled: Server) -> None:
    answer = labelled.client.post(RANK, json={"by": "output_score"})
    assert refused(answer) == ("unsupported_combination", "by")
    assert labelled.recorder.engine.prompts == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (ATTRIBUTE, TEXT, None),
        ("/v1/saes/a/contrast", {"positive": [TEXT], "negative": [TEXT]}, None),
        (
            "/v1/steering/suggest",
            {"sae": "a", "positive": [TEXT, TEXT], "negative": [TEXT, TEXT]},
            "sae",
        ),
    ],
)
def test_study_of_an_sae_whose_file_has_changed_is_refused_before_anything_runs(
    labelled: Server, tmp_path: Path, path: str, body: dict[str, Any], param: str | None
) -> None:
    os.utime(tmp_path / "a" / "sae_weights.safetensors", (1, 1))
    assert refused(labelled.client.post(path, json=body)) == ("invalid_weights", param)
    assert labelled.recorder.engine.prompts == []


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ([], ("invalid_type", None)),
        ({"prompt": "a"}, ("invalid_value", "completion")),
        ({"prompt": "a", "completion": ""}, ("invalid_value", "completion")),
        ({"completion": "b"}, ("invalid_value", "prompt")),
        ({**TEXT, "messages": []}, ("invalid_value", "messages")),
        ({**TEXT, "span": 3}, ("invalid_type", "span")),
        ({**TEXT, "span": [0]}, ("invalid_value", "span")),
        ({**TEXT, "span": [0, 1, 2]}, ("invalid_value", "span")),
        ({**TEXT, "span": [0, 2.0]}, ("invalid_type", "span[1]")),
        ({**TEXT, "span": [2, 2]}, ("invalid_value", "span")),
        ({**TEXT, "span": [-2, 2]}, ("invalid_value", "span")),
        ({**TEXT, "span": [0, 9]}, ("invalid_value", "span")),
        ({**TEXT, "candidates": []}, ("invalid_value", "candidates")),
        ({**TEXT, "candidates": 0}, ("invalid_value", "candidates")),
        ({**TEXT, "candidates": 6.0}, ("invalid_type", "candidates")),
        ({**TEXT, "candidates": True}, ("invalid_type", "candidates")),
        ({**TEXT, "candidates": "all"}, ("invalid_type", "candidates")),
        ({**TEXT, "candidates": [5, "6"]}, ("invalid_type", "candidates[1]")),
        ({**TEXT, "candidates": [5, 128]}, ("feature_out_of_range", "candidates[1]")),
        ({**TEXT, "mode": "delta"}, ("invalid_value", "mode")),
        ({**TEXT, "search": "greedy"}, ("invalid_value", "search")),
        ({**TEXT, "sae": "a"}, ("unknown_field", "sae")),
    ],
)
def test_bad_attribution_is_refused_before_anything_runs(
    labelled: Server, body: object, wanted: tuple[str, str | None]
) -> None:
    assert refused(labelled.client.post(ATTRIBUTE, json=body)) == wanted
    assert labelled.recorder.engine.prompts == []


def test_attribution_by_reread_where_it_cannot_be_is_refused(labelled: Server) -> None:
    answer = labelled.client.post("/v1/saes/k/attribute", json={**TEXT, "mode": "reread"})
    assert refused(answer) == ("unsupported_op", "mode")


def test_more_candidates_or_features_than_the_tokens_allow_are_refused(start: StartServer) -> None:
    server = start(saes={"a": {"features": FEATURES}}, options={"steering_max_study_tokens": 100})
    # A special token, "The weather" and " is cold" are 1 + 11 + 8 tokens; the last stays outside.
    for body, param in (
        ({**TEXT, "candidates": 4}, "candidates"),
        ({**TEXT, "candidates": [1, 2, 3, 4]}, "candidates"),
        ({**TEXT, "candidates": 2, "search": "groups"}, "candidates"),
        (TEXT, None),
    ):
        assert refused(server.client.post(ATTRIBUTE, json=body)) == ("study_too_large", param)
    answer = server.client.post(RANK, json={"prompt": [5] * 26, "features": [5, 7, 5]})
    assert refused(answer) == ("study_too_large", "features")
    answer = server.client.post(CALIBRATE, json={"steering": STEERING})
    assert refused(answer) == ("study_too_large", None)
