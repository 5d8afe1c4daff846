"""The routes that list SAEs and their features, and that inspect a text."""

from __future__ import annotations

import math
from typing import Any

import pytest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError

from server import models
from steering.request import catalog
from steering.request.plan import Inspection
from steering.request.positions import Positions
from steering.request.spec import Read
from tests.server.conftest import Server, StartServer

FEATURES = [
    {"index": 0, "label": "snow and rain", "max_activation": 6.5, "density": 0.25},
    {"index": 1, "label": "rain", "examples": [{"text": "wet", "activation": 2.0}]},
]


@pytest.fixture
def labelled(start: StartServer) -> Server:
    return start(saes={"a": {"features": FEATURES}})


def refused(response: Any, status: int = 400) -> tuple[str, str | None]:
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["code"], error["param"]


def test_cards_are_listed(labelled: Server) -> None:
    body = labelled.client.get("/v1/saes").json()
    (card,) = body["data"]
    assert body["object"] == "list"
    assert [*card] == [
        *("id", "object", "kind", "hook", "reads", "writes", "layer", "architecture", "d_in"),
        *("d_sae", "dtype", "source"),
        *("format", "sha256", "sink_norm", "error_term", "has_labels", "has_max_activations"),
    ]
    assert (card["id"], card["hook"], card["sha256"]) == ("a", "blocks.1.hook_resid_post", None)
    assert labelled.client.get("/v1/saes/a").json() == card


def test_server_without_saes_lists_none(start: StartServer) -> None:
    server = start(saes={})
    assert server.client.get("/v1/saes").json() == {"object": "list", "data": []}
    assert refused(server.client.get("/v1/saes/a"), 404) == ("unknown_sae", "sae")


@pytest.mark.parametrize("name", ["b", "A", "a%2Fb", "a%20b", "%F0%9F%8C%A7", "..%2F..%2Fetc"])
@pytest.mark.parametrize("rest", ["", "/features", "/features/1"])
def test_unknown_name_in_the_path_is_not_found(labelled: Server, name: str, rest: str) -> None:
    assert refused(labelled.client.get(f"/v1/saes/{name}{rest}"), 404) == ("unknown_sae", "sae")


def test_name_may_be_any_that_a_url_can_hold(start: StartServer) -> None:
    server = start(saes={"mes traits:é@1+é~'()*": {}})
    assert server.client.get("/v1/saes/mes%20traits%3A%C3%A9%401+%C3%A9~'()*").status_code == 200


@pytest.mark.parametrize(
    "path", ["", "/a", "/a/features", "/a/features?limit=2", "/a/features/3", "/mes%20%C3%A9", "/b"]
)
def test_a_last_slash_makes_no_difference(start: StartServer, path: str) -> None:
    client = start(saes={"a": {"features": FEATURES}, "mes é": {}}).client
    bare, question, query = path.partition("?")
    slashed = client.get(f"/v1/saes{bare}/{question}{query}")
    expected = client.get(f"/v1/saes{path}")
    assert [response.status_code for response in slashed.history] == [307]
    assert (slashed.status_code, slashed.json()) == (expected.status_code, expected.json())


def test_inspect_takes_post_with_a_last_slash_too(labelled: Server) -> None:
    assert labelled.client.post("/v1/saes/a/inspect/", json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_inspect_takes_post_alone(labelled: Server, method: str) -> None:
    response = labelled.client.request(method, "/v1/saes/a/inspect")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_inspect_of_an_unknown_sae_is_not_found_by_get_either(labelled: Server) -> None:
    assert refused(labelled.client.get("/v1/saes/b/inspect"), 404) == ("unknown_sae", "sae")


def test_features_come_in_pages(labelled: Server) -> None:
    body = labelled.client.get("/v1/saes/a/features?limit=1&offset=0").json()
    assert body == {
        "object": "list",
        "data": [
            {
                "feature": 0,
                "label": "snow and rain",
                "max_activation": 6.5,
                "density": 0.25,
                "output_score": None,
            }
        ],
        "total": 128,
        "has_more": True,
    }
    last = labelled.client.get("/v1/saes/a/features?offset=127").json()
    assert (len(last["data"]), last["has_more"]) == (1, False)
    past = labelled.client.get("/v1/saes/a/features?offset=128").json()
    assert (past["data"], past["has_more"]) == ([], False)
    assert len(labelled.client.get("/v1/saes/a/features").json()["data"]) == 50


def test_labels_are_searched(labelled: Server) -> None:
    body = labelled.client.get("/v1/saes/a/features", params={"query": "rain", "limit": 1}).json()
    assert [feature["feature"] for feature in body["data"]] == [1]
    assert (body["total"], body["has_more"]) == (2, True)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("output_score", [2, 0, 1, 3]),
        ("density", [1, 0, 2, 3]),
        ("max_activation", [0, 2, 1, 3]),
        (None, [0, 1, 2, 3]),
    ],
)
def test_features_come_in_an_order_with_those_that_lack_the_figure_last(
    start: StartServer, order: str | None, expected: list[int]
) -> None:
    rows = [
        {"index": 0, "label": "rain", "max_activation": 6.5, "density": 0.25, "output_score": 0.1},
        {"index": 1, "label": "rain too", "density": 0.5},
        {"index": 2, "label": "snow", "max_activation": 2, "density": 0.1, "output_score": 0.3},
    ]
    client = start(saes={"a": {"features": rows, "d_sae": 4}}).client
    asked: dict[str, Any] = {} if order is None else {"order": order}
    body = client.get("/v1/saes/a/features", params=asked).json()
    assert [feature["feature"] for feature in body["data"]] == expected
    page = client.get("/v1/saes/a/features", params={**asked, "limit": 2, "offset": 1}).json()
    assert [feature["feature"] for feature in page["data"]] == expected[1:3]
    if order is not None:
        found = client.get("/v1/saes/a/features", params={**asked, "query": "rain"}).json()
        assert [f["feature"] for f in found["data"]] == [i for i in expected if i in (0, 1)]


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limit=0", "invalid_value", "limit"),
        ("limit=1001", "invalid_value", "limit"),
        ("limit=", "invalid_type", "limit"),
        ("limit=5.0", "invalid_type", "limit"),
        ("limit=" + "9" * 5000, "invalid_value", "limit"),
        ("offset=-1", "invalid_value", "offset"),
        ("offset=x", "invalid_type", "offset"),
        ("order=label", "invalid_value", "order"),
        ("order=", "invalid_value", "order"),
        ("order=Density&query=rain", "invalid_value", "order"),
    ],
)
def test_bad_page_is_refused(labelled: Server, query: str, code: str, param: str) -> None:
    assert refused(labelled.client.get(f"/v1/saes/a/features?{query}")) == (code, param)


def test_feature_shows_its_neighbours_and_examples(labelled: Server) -> None:
    body = labelled.client.get("/v1/saes/a/features/1").json()
    assert (body["feature"], body["label"], body["max_activation"]) == (1, "rain", None)
    assert body["examples"] == [{"text": "wet", "activation": 2.0}]
    assert len(body["nearest"]) == 10
    # Encoder and decoder rows of norm 1: no product exceeds 1.
    assert -1 <= body["self_gain"] <= 1
    changes = [abs(change) for _, change in body["interferers"]]
    assert len(changes) == 10 and changes == sorted(changes, reverse=True)
    assert changes[0] <= 1 + 1e-6
    assert body["feature"] not in [feature for feature, _ in body["interferers"]]
    assert body["promoted"] == body["suppressed"] == []


@pytest.mark.parametrize(
    ("feature", "status", "code"),
    [
        ("128", 404, "feature_out_of_range"),
        ("-1", 404, "feature_out_of_range"),
        ("9" * 5000, 404, "feature_out_of_range"),
        ("1.0", 400, "invalid_type"),
        ("x", 400, "invalid_type"),
        ("%D9%A1", 400, "invalid_type"),
    ],
)
def test_bad_feature_is_refused(labelled: Server, feature: str, status: int, code: str) -> None:
    response = labelled.client.get(f"/v1/saes/a/features/{feature}")
    assert refused(response, status) == (code, "feature")


def test_label_that_is_not_unicode_is_shown(start: StartServer) -> None:
    server = start(saes={"a": {"features": []}})
    table = server.client.app.state.steering.catalog.features("a")  # type: ignore[attr-defined]
    table.path.write_text('{"index": 3, "label": "\\ud800"}\n')
    table._table = None
    assert "\\ud800" in server.client.get("/v1/saes/a/features/3").text


# Inspecting a text


def test_prompt_is_read_and_nothing_generated(labelled: Server) -> None:
    response = labelled.client.post("/v1/saes/a/inspect", json={"prompt": "rain", "top_k": 2})
    assert response.json() == {
        "sae": "a",
        "tokens": [
            {
                "position": 1,
                "id": 8,
                "text": "x",
                "phase": "prompt",
                "features": [[3, 2.0], [8, 1.0]],
            }
        ],
        "features": [
            {"feature": 3, "score": 2.0, "label": None},
            {"feature": 8, "score": 1.0, "label": None},
        ],
    }
    (request,) = labelled.recorder.requests
    assert (request.prompt, request.max_tokens) == ("rain", 1)
    accepted = labelled.recorder.accepted
    assert accepted.spec.positions == Positions(generation=False)
    assert accepted.spec.read == Read("a", 2)
    assert accepted.inspection == Inspection("max", special_tokens=False)
    (params,) = labelled.recorder.engine.params
    assert params.max_tokens == 1


def test_messages_are_rendered_without_a_generation_prompt(labelled: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": "rain"}],
        "aggregate": "frequency",
        "special_tokens": True,
    }
    assert labelled.client.post("/v1/saes/a/inspect", json=body).status_code == 200
    (request,) = labelled.recorder.requests
    assert request.add_generation_prompt is False
    accepted = labelled.recorder.accepted
    assert accepted.inspection == Inspection("frequency", special_tokens=True)
    assert accepted.spec.positions.special_tokens is True


def test_prompt_may_be_token_ids(labelled: Server) -> None:
    body = {"prompt": [7, 0, 9]}
    assert labelled.client.post("/v1/saes/a/inspect", json=body).status_code == 200
    (request,) = labelled.recorder.requests
    assert request.prompt == [7, 0, 9]


def test_token_id_outside_the_vocabulary_is_refused_as_completions_refuse_it(
    labelled: Server,
) -> None:
    labelled.recorder.error = VLLMValidationError("Token id 2**70 is out of vocabulary")
    inspected = labelled.client.post("/v1/saes/a/inspect", json={"prompt": [7, 2**70]})
    completed = labelled.client.post("/v1/completions", json={"prompt": [7, 2**70]})
    assert inspected.status_code == completed.status_code == 400
    assert inspected.json() == completed.json()


def test_null_is_left_out(labelled: Server) -> None:
    body = {"prompt": "x", "messages": None, "top_k": None, "aggregate": None, "model": None}
    assert labelled.client.post("/v1/saes/a/inspect", json=body).status_code == 200
    assert labelled.recorder.accepted.spec.read == Read("a", 5)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "messages"),
        ({"prompt": "x", "messages": []}, "invalid_value", "prompt"),
        ({"prompt": ["x"]}, "invalid_type", "prompt"),
        ({"prompt": [7, "x"]}, "invalid_type", "prompt"),
        ({"prompt": [[7, 8]]}, "invalid_type", "prompt"),
        ({"prompt": [7, True]}, "invalid_type", "prompt"),
        ({"prompt": [7.0]}, "invalid_type", "prompt"),
        ({"prompt": [None]}, "invalid_type", "prompt"),
        ({"prompt": {"7": 8}}, "invalid_type", "prompt"),
        ({"prompt": [7, -1]}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"messages": "x"}, "invalid_type", "messages"),
        ({"messages": [{"role": 5}]}, "invalid_value", "messages"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"prompt": "x", "top_k": 0}, "invalid_value", "top_k"),
        ({"prompt": "x", "top_k": 65}, "invalid_value", "top_k"),
        ({"prompt": "x", "top_k": 5.0}, "invalid_type", "top_k"),
        ({"prompt": "x", "top_k": True}, "invalid_type", "top_k"),
        ({"prompt": "x", "aggregate": "sum"}, "invalid_value", "aggregate"),
        ({"prompt": "x", "aggregate": 1}, "invalid_type", "aggregate"),
        ({"prompt": "x", "special_tokens": 1}, "invalid_type", "special_tokens"),
        ({"prompt": "x", "layer": 3}, "unknown_field", "layer"),
        ({"prompt": "x", "steering_x": 1}, "unknown_field", "steering_x"),
        ([], "invalid_type", None),
    ],
)
def test_bad_body_is_refused(labelled: Server, body: Any, code: str, param: str | None) -> None:
    assert refused(labelled.client.post("/v1/saes/a/inspect", json=body)) == (code, param)
    assert labelled.recorder.requests == []


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ([5], "[5]"),
        ({"prompt": {"7": 8}}, '{"7": 8}'),
        ({"prompt": "x", "top_k": 65}, "65"),
        ({"prompt": "x", "top_k": 5.0}, "5.0"),
        ({"prompt": "x", "special_tokens": None, "model": 1}, "1"),
    ],
)
def test_refusal_of_a_body_names_the_value(labelled: Server, body: Any, shown: str) -> None:
    answer = labelled.client.post("/v1/saes/a/inspect", json=body)
    assert shown in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", ["", "{", "[" * 50_000, '{"top_k":' + "9" * 5000 + "}"])
def test_body_that_is_not_json_is_refused(labelled: Server, body: str) -> None:
    response = labelled.client.post("/v1/saes/a/inspect", content=body)
    assert refused(response) == ("invalid_value", None)


def test_text_of_too_many_values_is_refused_by_the_fields_that_inspect_has(
    start: StartServer,
) -> None:
    response = start(max_read_values=3 * 32).client.post(
        "/v1/saes/a/inspect", json={"prompt": "x", "top_k": 33}
    )
    assert refused(response) == ("invalid_value", "top_k")
    assert response.json()["error"]["message"].endswith(
        "is 99 values, the limit is 96: lower top_k, or send less text"
    )


def test_weights_that_cannot_be_used_are_refused_without_a_path_into_a_steering_field(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an SAE is too large to be scanned at start."""
    monkeypatch.setattr(catalog, "SCAN_LIMIT_BYTES", 0)
    client = start(saes={"a": {"threshold": math.nan}}).client
    read = client.post("/v1/completions", json={"prompt": "x", "steering": {"read": {}}})
    assert refused(read) == ("invalid_weights", "steering.read")
    for body in ({"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}):
        inspected = client.post("/v1/saes/a/inspect", json=body)
        assert refused(inspected) == ("invalid_weights", None)
        assert inspected.json()["error"]["message"] == read.json()["error"]["message"]


def test_unknown_sae_is_not_found_before_the_body_is_read(labelled: Server) -> None:
    assert refused(labelled.client.post("/v1/saes/b/inspect", content="{"), 404) == (
        "unknown_sae",
        "sae",
    )


def test_vllms_refusal_of_the_prompt_passes_through(labelled: Server) -> None:
    labelled.recorder.error_response = create_error_response("too long")
    body = {"messages": [{"role": "user", "content": "rain"}]}
    response = labelled.client.post("/v1/saes/a/inspect", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "too long"


def test_openapi_documents_refusals(labelled: Server) -> None:
    paths = labelled.client.get("/openapi.json").json()["paths"]
    ours = {path: list(methods) for path, methods in paths.items() if "/saes" in path}
    assert ours == {
        "/v1/saes": ["get"],
        "/v1/saes/{sae}": ["get"],
        "/v1/saes/{sae}/features": ["get"],
        "/v1/saes/{sae}/features/{feature}": ["get"],
        "/v1/saes/{sae}/inspect": ["post"],
        "/v1/saes/{sae}/contrast": ["post"],
        "/v1/saes/{sae}/rank": ["post"],
        "/v1/saes/{sae}/attribute": ["post"],
    }
    for path, (method,) in ours.items():
        assert {"400", "404"} <= paths[path][method]["responses"].keys()


def test_openapi_describes_what_the_routes_return(labelled: Server) -> None:
    paths = labelled.client.get("/openapi.json").json()
    asked: dict[str, tuple[type[models.Answer], Any]] = {
        "/v1/saes": (models.CardList, labelled.client.get("/v1/saes")),
        "/v1/saes/{sae}": (models.Card, labelled.client.get("/v1/saes/a")),
        "/v1/saes/{sae}/features": (
            models.FeatureList,
            labelled.client.get("/v1/saes/a/features"),
        ),
        "/v1/saes/{sae}/features/{feature}": (
            models.FeatureDetail,
            labelled.client.get("/v1/saes/a/features/1"),
        ),
        "/v1/saes/{sae}/inspect": (
            models.InspectAnswer,
            labelled.client.post("/v1/saes/a/inspect", json={"prompt": "rain"}),
        ),
    }
    for path, (model, response) in asked.items():
        (operation,) = paths["paths"][path].values()
        described = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert described["$ref"].rpartition("/")[2] == model.__name__
        model.model_validate_json(response.content, strict=True)
