"""Studies over HTTP: their routes and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from safetensors.numpy import load_file

from steering.studies.registry import STUDIES
from steering.studies.study import MAX_STUDY_TOKENS
from tests.server.conftest import Server, StartServer
from tests.server.refusals import refused

FORECAST = "/v1/steering/forecast"
CONTRAST = "/v1/saes/a/contrast"
EDIT: Final = {"feature": 5, "op": "clamp", "value": 2.0}
STEERING: Final = {"interventions": [EDIT]}
FEATURES = [{"index": 5, "label": "snow", "max_activation": 4.0}, {"index": 6, "label": "rain"}]
TEXT = {"prompt": "The weather", "completion": " is cold"}
SIDES = {"positive": [TEXT], "negative": [TEXT]}


@pytest.fixture
def labelled(start: StartServer) -> Server:
    return start(saes={"a": {"features": FEATURES}})


# Forecast: its arithmetic


def weights(tmp_path: Path) -> tuple[Any, Any]:
    tensors = load_file(tmp_path / "a" / "sae_weights.safetensors")
    return tensors["W_enc"].astype(np.float64).T, tensors["W_dec"].astype(np.float64)


def test_forecast_is_what_numpy_makes_of_the_weights(labelled: Server, tmp_path: Path) -> None:
    edits = [
        EDIT,
        {"feature": 9, "op": "add", "value": -3.0},
        {"feature": 5, "op": "scale", "value": 3.0, "positions": {"prompt": False}},
    ]
    edits[0] = {**EDIT, "positions": {"generation": False}}
    answer = labelled.client.post(FORECAST, json={"steering": {"interventions": edits}}).json()
    W_enc, W_dec = weights(tmp_path)
    norm = np.linalg.norm(W_dec, axis=1)
    (gains,) = answer["gains"]
    assert (gains["sae"], gains["features"]) == ("a", [5, 9])
    np.testing.assert_allclose(gains["G"], W_enc[[5, 9]] @ W_dec[[5, 9]].T, rtol=1e-6)
    wanted = [2 * norm[5], 3 * norm[9], 2 * norm[5] * 4.0]
    assert [edit["norm"] for edit in answer["edits"]] == pytest.approx(wanted, rel=1e-6)
    for edit in answer["edits"]:
        moved = W_enc @ W_dec[edit["feature"]]
        assert edit["self_gain"] == pytest.approx(moved[edit["feature"]], rel=1e-6)
        moved[[5, 9]] = 0
        order = np.argsort(-np.abs(moved))[:10].tolist()
        assert [feature for feature, _, _ in edit["interferers"]] == order
        assert [c for _, c, _ in edit["interferers"]] == pytest.approx(moved[order], rel=1e-5)
        labels = {feature: label for feature, _, label in edit["interferers"]}
        assert all(label is None for feature, label in labels.items() if feature != 6)
        assert (edit["sae"], edit["share"]) == ("a", None)


@pytest.mark.parametrize("op", ["ablate", "cap"])
def test_norm_of_what_only_takes_away_is_that_of_the_recorded_maximum(
    labelled: Server, tmp_path: Path, op: str
) -> None:
    value = {} if op == "ablate" else {"value": 1.0}
    edits = [{"feature": feature, "op": op, **value} for feature in (5, 6)]
    answer = labelled.client.post(FORECAST, json={"steering": {"interventions": edits}}).json()
    _, W_dec = weights(tmp_path)
    norms = [edit["norm"] for edit in answer["edits"]]
    assert norms == [pytest.approx(4 * np.linalg.norm(W_dec[5]), rel=1e-6), None]


def test_protected_feature_is_not_moved_by_the_forecast_edit(labelled: Server) -> None:
    plain = labelled.client.post(FORECAST, json={"steering": STEERING}).json()
    first = plain["edits"][0]["interferers"][0][0]
    spared = {**STEERING, "protect": [{"feature": first}]}
    answer = labelled.client.post(FORECAST, json={"steering": spared}).json()
    moved = [feature for feature, _, _ in answer["edits"][0]["interferers"]]
    assert first not in moved
    assert answer["edits"][0]["norm"] < plain["edits"][0]["norm"]


def test_share_is_of_the_median_norm_where_a_self_check_measured_it(
    labelled: Server, tmp_path: Path
) -> None:
    app: Any = labelled.client.app
    app.state.steering.catalog.note_stream_norm("a", 40.0)
    (edit,) = labelled.client.post(FORECAST, json={"steering": STEERING}).json()["edits"]
    assert edit["share"] == pytest.approx(edit["norm"] / 40)


# Bodies


def test_steering_inside_a_studys_body_is_neither_foreign_nor_misplaced(labelled: Server) -> None:
    assert labelled.client.post(FORECAST, json={"steering": STEERING}).status_code == 200
    body = {"steering": {"interventions": [{**EDIT, "feature": 999}]}}
    found = refused(labelled.client.post(FORECAST, json=body))
    assert found == ("feature_out_of_range", "steering.interventions[0].feature")


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (5, ("invalid_type", None)),
        ([], ("invalid_type", None)),
        ({}, ("invalid_value", "steering")),
        ({"steering": None}, ("invalid_type", "steering")),
        ({"steering": {}}, ("invalid_value", "steering.interventions")),
        ({"steering": {"read": {}}}, ("invalid_value", "steering.interventions")),
        ({"steering": STEERING, "stream": 1}, ("invalid_type", "stream")),
        ({"steering": STEERING, "model": 1}, ("invalid_type", "model")),
        ({"steering": STEERING, "Steering": 1}, ("unknown_field", "Steering")),
        ({"steering": STEERING, "extra_body": {"steering": {}}}, ("unknown_field", "extra_body")),
        (
            {"steering": {**STEERING, "stop_when": {"feature": 1, "above": 0}}},
            ("unsupported_combination", "steering.stop_when"),
        ),
        (
            {"steering": {"interventions": [{**EDIT, "unit": "max_act", "feature": 7}]}},
            ("max_act_unknown", "steering.interventions[0].unit"),
        ),
    ],
)
def test_bad_body_is_refused_with_its_path(
    labelled: Server, body: object, wanted: tuple[str, str | None]
) -> None:
    assert refused(labelled.client.post(FORECAST, json=body)) == wanted


def test_report_and_read_of_a_body_are_ignored(labelled: Server) -> None:
    body = {"steering": {**STEERING, "report": True, "read": {"top_k": 3}}}
    answer = labelled.client.post(FORECAST, json=body)
    assert answer.json() == labelled.client.post(FORECAST, json={"steering": STEERING}).json()


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_body_that_is_no_json_is_refused(labelled: Server, raw: bytes) -> None:
    assert refused(labelled.client.post(FORECAST, content=raw)) == ("invalid_value", None)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"positive": []}, ("invalid_value", "positive")),
        ({"negative": None}, ("invalid_type", "negative")),
        ({"positive": [TEXT] * 257}, ("study_too_large", "positive")),
        ({"positive": [TEXT, {}]}, ("invalid_value", "positive[1].prompt")),
        ({"positive": [{**TEXT, "messages": []}]}, ("invalid_value", "positive[0].messages")),
        ({"positive": [{**TEXT, "completion": ""}]}, ("invalid_value", "positive[0].completion")),
        ({"positive": [{"prompt": ""}]}, ("invalid_value", "positive[0].prompt")),
        ({"positive": [{"prompt": [1, True]}]}, ("invalid_type", "positive[0].prompt[1]")),
        ({"positive": [{"prompt": [1, -1]}]}, ("invalid_value", "positive[0].prompt[1]")),
        ({"positive": [{"prompt": [1, 320]}]}, ("invalid_value", "positive[0].prompt")),
        ({"positive": [{"prompt": 5}]}, ("invalid_type", "positive[0].prompt")),
        ({"positive": [{"prompt": "a" * 400}]}, ("invalid_value", "positive[0]")),
        ({"positive": [{**TEXT, "label": 1}]}, ("unknown_field", "positive[0].label")),
        ({"positive": [{"messages": [5]}]}, ("invalid_type", "positive[0].messages[0]")),
        ({"positive": [{"messages": [{"a": 5}]}]}, ("invalid_value", "positive[0].messages")),
        (
            {"positive": [{"prompt": "b"}], "over": "completion"},
            ("invalid_value", "positive[0].completion"),
        ),
        ({"positive": [{"prompt": [1]}], "over": "prompt"}, ("invalid_value", "positive[0]")),
        ({"positive": [{"prompt": [1, 2, 3]}]}, ("invalid_value", "positive[0]")),
        ({"density": [0.5, 0.1]}, ("invalid_value", "density")),
        ({"density": [0.5]}, ("invalid_value", "density")),
        ({"density": [0, 1.5]}, ("invalid_value", "density[1]")),
        ({"top_k": 0}, ("invalid_value", "top_k")),
        ({"top_k": 5.0}, ("invalid_type", "top_k")),
        ({"by": "f1"}, ("invalid_value", "by")),
        ({"pool": "median"}, ("invalid_value", "pool")),
    ],
)
def test_bad_contrast_is_refused_before_anything_runs(
    start: StartServer, change: dict[str, Any], wanted: tuple[str, str | None]
) -> None:
    server = start(special_token_ids=(0, 1, 2, 3))
    for more in ({}, {"stream": True}):
        answer = server.client.post(CONTRAST, json={**SIDES, **change, **more})
        assert refused(answer) == wanted
    assert server.recorder.engine.prompts == []


def test_study_of_more_tokens_than_the_limit_is_refused_with_both_numbers(
    start: StartServer,
) -> None:
    server = start(options={"steering_max_study_tokens": 39})
    # A special token, "The weather" and " is cold" are 1 + 11 + 8 tokens, twice.
    answer = server.client.post(CONTRAST, json=SIDES)
    assert refused(answer) == ("study_too_large", None)
    message = answer.json()["error"]["message"]
    assert "40 tokens" in message and "39" in message
    assert server.recorder.engine.prompts == []


def test_limit_of_tokens_is_the_contracts_unless_told() -> None:
    assert MAX_STUDY_TOKENS == 262144


# Routes


def test_unknown_sae_in_the_path_is_not_found(labelled: Server) -> None:
    answer = labelled.client.post("/v1/saes/b/contrast", json=SIDES)
    assert refused(answer, 404) == ("unknown_sae", "sae")


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_study_is_posted_and_nothing_else(labelled: Server, name: str, method: str) -> None:
    path = STUDIES[name].route.replace("{sae}", "a")
    answer = labelled.client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


def test_server_without_saes_cannot_study(start: StartServer) -> None:
    server = start(saes={})
    answer = server.client.post(FORECAST, json={"steering": STEERING})
    assert refused(answer) == ("steering_unavailable", None)


@pytest.mark.parametrize("name", STUDIES)
def test_api_key_guards_every_study(start: StartServer, name: str) -> None:
    server = start("--api-key", "sesame")
    path = STUDIES[name].route.replace("{sae}", "a")
    assert server.client.post(path, json={}).status_code == 401
    key = {"Authorization": "Bearer sesame"}
    assert server.client.post(path, json=5, headers=key).status_code == 400


def test_model_is_the_bases_name(labelled: Server) -> None:
    body = {"steering": STEERING, "model": "tiny"}
    assert labelled.client.post(FORECAST, json=body).status_code == 200
    answer = labelled.client.post(FORECAST, json={**body, "model": "other"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")


def test_preset_is_no_model_of_a_study(start: StartServer, tmp_path: Path) -> None:
    file = tmp_path / "cold.json"
    file.write_text(json.dumps(STEERING))
    server = start(options={"steering_preset": [f"cold={file}"], "steering_default": "cold"})
    body = {"steering": STEERING, "model": "cold"}
    assert refused(server.client.post(FORECAST, json=body)) == ("invalid_value", "model")


def test_default_preset_does_not_steer_an_unsteered_side(
    start: StartServer, tmp_path: Path
) -> None:
    file = tmp_path / "cold.json"
    file.write_text(json.dumps(STEERING))
    server = start(options={"steering_preset": [f"cold={file}"], "steering_default": "cold"})
    server.client.post(CONTRAST, json=SIDES)
    assert server.recorder.engine.params
    for params in server.recorder.engine.params:
        accepted = (params.extra_args or {}).get("steering")
        assert accepted is None or not accepted.spec.edits


@pytest.mark.parametrize("name", STUDIES)
def test_openapi_shows_body_and_answer_of_every_study(labelled: Server, name: str) -> None:
    study = STUDIES[name]
    shown = labelled.client.get("/openapi.json").json()["paths"][study.route]["post"]
    body = shown["requestBody"]["content"]["application/json"]["schema"]
    assert {*body["properties"]} == {*study.body.model_fields}
    content = shown["responses"]["200"]["content"]
    assert {*content["application/json"]["schema"]["properties"]} == {*study.answer.model_fields}
    assert "text/event-stream" in content
    assert "$ref" not in json.dumps([body, content])
