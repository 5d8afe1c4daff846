"""Presets over HTTP: a model's name that steers, and the routes that make, show and delete it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.lora.request import LoRARequest

from server.presets.models import presets_mean_base
from tests.server.bodies import BODIES, MESSAGES
from tests.server.conftest import Server, StartServer

EDIT = {"feature": 5, "op": "clamp", "value": 1}
OTHER = {"feature": 6, "op": "scale", "value": 2}
#: What `calm` steers.
CALM = {"interventions": [EDIT, OTHER], "positions": {"prompt": False}}
PRESETS = "/v1/steering/presets"

routes = pytest.mark.parametrize("path", BODIES)
Features = list[tuple[int, float]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "presets"
    made.mkdir()
    (made / "calm.json").write_text(json.dumps({"steering": CALM, "description": "less of it"}))
    return made


@pytest.fixture
def begin(start: StartServer, folder: Path) -> Callable[..., Server]:
    """Start a server on the folder of presets."""

    def run(*flags: str, saes: dict[str, Any] | None = None, **options: Any) -> Server:
        options = {"steering_presets": str(folder), **options}
        return start(*flags, saes=saes, options=options)

    return run


@pytest.fixture
def server(begin: Callable[..., Server]) -> Server:
    return begin()


def app_state(server: Server) -> Any:
    app: Any = server.client.app
    return app.state


def ask(server: Server, path: str, **more: Any) -> Any:
    return server.client.post(path, json={**BODIES[path], **more})


def steered(server: Server) -> Features:
    """What the only request edits."""
    spec = server.recorder.accepted.spec
    return sorted((edit.feature, edit.effective_value) for edit in spec.edits)


def error_of(response: Any) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def requests_of(preset: str) -> float:
    sample = REGISTRY.get_sample_value("steering_preset_requests_total", {"preset": preset})
    return sample or 0.0


# A preset's name as `model`


@routes
def test_name_of_a_preset_steers_and_names_the_response(server: Server, path: str) -> None:
    response = ask(server, path, model="calm")
    assert (response.status_code, response.json()["model"]) == (200, "calm")
    assert steered(server) == [(5, 1.0), (6, 2.0)]
    assert not server.recorder.accepted.spec.positions.prompt


@routes
def test_stream_of_a_preset_is_called_by_its_name(server: Server, path: str) -> None:
    text = ask(server, path, model="calm", stream=True).text
    assert '"model":"calm"' in text.replace(": ", ":") and "tiny" not in text
    assert steered(server) == [(5, 1.0), (6, 2.0)]


@routes
def test_base_stays_unsteered_beside_presets(server: Server, path: str) -> None:
    assert ask(server, path, model="calm").status_code == 200
    server.recorder.engine.params.clear()
    response = ask(server, path, model="tiny")
    assert response.json()["model"] == "tiny"
    assert server.recorder.extra_args == {}


@routes
def test_own_steering_is_laid_over_the_preset(server: Server, path: str) -> None:
    own = {"interventions": [{"sae": "a", "feature": 5, "op": "clamp", "value": 7}], "report": True}
    response = ask(server, path, model="calm", steering=own)
    assert steered(server) == [(5, 7.0), (6, 2.0)]
    assert len(response.json()["steering"]["interventions"]) == 2


@routes
@pytest.mark.parametrize("own", [None, {}, {"interventions": []}, {"report": None}])
def test_field_that_asks_for_nothing_changes_nothing(server: Server, path: str, own: Any) -> None:
    response = ask(server, path, model="calm", steering=own)
    assert response.status_code == 200 and "steering" not in response.json()
    assert steered(server) == [(5, 1.0), (6, 2.0)]


def test_report_alone_is_valid_beside_a_preset(server: Server) -> None:
    response = ask(server, "/v1/completions", model="calm", steering={"report": True})
    assert len(response.json()["steering"]["interventions"]) == 2


@routes
def test_wrong_field_is_refused_with_a_path_into_the_request(server: Server, path: str) -> None:
    own = {"interventions": [{"feature": -1, "op": "ablate"}]}
    expected = (400, "feature_out_of_range", "steering.interventions[0].feature")
    assert error_of(ask(server, path, model="calm", steering=own)) == expected
    assert error_of(ask(server, path, model="calm", steering=3))[1] == "invalid_type"


@routes
def test_unknown_name_is_vllms_own_404(server: Server, path: str) -> None:
    response = ask(server, path, model="clam")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NotFoundError"


def test_combinations_are_refused_as_for_the_field(server: Server) -> None:
    for path, more in (
        ("/v1/completions", {"use_beam_search": True, "n": 2}),
        ("/v1/chat/completions", {"use_beam_search": True, "n": 2}),
        ("/v1/responses", {"background": True, "steering": {"report": True}}),
    ):
        response = ask(server, path, model="calm", **more)
        assert error_of(response) == (400, "unsupported_combination", "steering")


def test_preset_that_reports_does_so_unasked(server: Server) -> None:
    server.client.put(f"{PRESETS}/told", json={**CALM, "report": True})
    assert (
        len(ask(server, "/v1/completions", model="told").json()["steering"]["interventions"]) == 2
    )


def test_name_is_unknown_where_it_could_only_be_ignored(server: Server) -> None:
    models = app_state(server).openai_serving_models
    assert not models.is_base_model("calm")
    with presets_mean_base():
        assert models.is_base_model("calm") and not models.is_base_model("clam")


def test_adapter_is_not_loaded_under_the_name_of_a_preset(
    begin: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    server = begin("--enable-lora")
    body = {"lora_name": "calm", "lora_path": "/nowhere"}
    refused = server.client.post("/v1/load_lora_adapter", json=body)
    assert refused.status_code == 400
    assert "conflicts with a served base model" in refused.json()["error"]["message"]


def test_presets_are_listed_after_the_base(begin: Callable[..., Server], folder: Path) -> None:
    os.utime(folder / "calm.json", (7, 7))
    data = begin().client.get("/v1/models").json()["data"]
    assert [(m["id"], m["parent"]) for m in data] == [("tiny", None), ("calm", "tiny")]
    assert (data[1]["root"], data[1]["object"], data[1]["created"]) == ("tiny", "model", 7)
    assert data[1]["max_model_len"] == data[0]["max_model_len"]


def test_requests_and_edits_of_a_preset_are_counted(server: Server) -> None:
    labels = {"sae": "a", "op": "scale"}
    before = requests_of("calm"), REGISTRY.get_sample_value("steering_requests_total", labels)
    ask(server, "/v1/completions", model="calm")
    ask(server, "/v1/completions", model="tiny", steering=CALM)
    assert requests_of("calm") == before[0] + 1
    edits = REGISTRY.get_sample_value("steering_requests_total", labels)
    assert edits == (before[1] or 0) + 2


# The default


@routes
def test_default_steers_the_base_under_its_own_name(
    begin: Callable[..., Server], path: str
) -> None:
    server = begin(steering_default="calm")
    response = ask(server, path)
    assert (response.status_code, response.json()["model"]) == (200, "tiny")
    assert steered(server) == [(5, 1.0), (6, 2.0)]


@routes
def test_request_opts_out_of_the_default(begin: Callable[..., Server], path: str) -> None:
    server = begin(steering_default="calm")
    before = requests_of("calm")
    response = ask(server, path, model="tiny", steering={"interventions": []})
    assert (response.status_code, response.json()["model"]) == (200, "tiny")
    assert server.recorder.accepted.spec.edits == ()
    assert requests_of("calm") == before


def test_own_steering_is_laid_over_the_default(begin: Callable[..., Server]) -> None:
    server = begin(steering_default="calm")
    ask(server, "/v1/completions", steering={"interventions": [{**EDIT, "value": 3}]})
    assert steered(server) == [(5, 3.0), (6, 2.0)]


def test_preset_by_name_comes_before_the_default(begin: Callable[..., Server]) -> None:
    server = begin(steering_default="calm")
    server.client.put(f"{PRESETS}/wild", json={"interventions": [{**EDIT, "feature": 7}]})
    assert ask(server, "/v1/completions", model="wild").json()["model"] == "wild"
    assert steered(server) == [(7, 1.0)]


def test_default_does_not_steer_an_adapter(begin: Callable[..., Server]) -> None:
    server = begin(steering_default="calm")
    models = app_state(server).openai_serving_models
    models.lora_requests["adapted"] = LoRARequest("adapted", 1, "/nowhere")
    assert ask(server, "/v1/completions", model="adapted").json()["model"] == "adapted"
    assert server.recorder.extra_args == {}
    taken = server.client.put(f"{PRESETS}/adapted", json=CALM)
    assert error_of(taken) == (400, "invalid_value", "name")


def test_default_is_not_dropped_where_a_route_cannot_steer(begin: Callable[..., Server]) -> None:
    server = begin(steering_default="calm")
    batch = {"messages": [MESSAGES]}
    response = server.client.post("/v1/chat/completions/batch", json={**batch, "model": "tiny"})
    assert error_of(response) == (400, "unsupported_combination", "model")
    assert "--steering-default" in response.json()["error"]["message"]
    response = server.client.post("/v1/chat/completions/batch", json=batch)
    assert error_of(response) == (400, "unsupported_combination", "model")


# The routes


def test_preset_is_made_replaced_and_deleted(server: Server, folder: Path) -> None:
    body = {"steering": CALM, "description": "d"}
    made = server.client.put(f"{PRESETS}/new", json=body)
    assert made.status_code == 201
    entry = made.json()
    assert isinstance(entry.pop("created"), int)
    expected = {"name": "new", "object": "steering.preset", "base": "tiny", **body}
    assert entry == expected
    assert json.loads((folder / "new.json").read_text()) == body
    assert server.client.put(f"{PRESETS}/new", json=CALM).status_code == 200
    assert server.client.get(f"{PRESETS}/new").json()["description"] is None
    assert steered_by(server, "new") == [(5, 1.0), (6, 2.0)]
    gone = server.client.delete(f"{PRESETS}/new")
    assert (gone.status_code, gone.content) == (204, b"")
    for name in ("new", "new%2Fer", "new/er"):
        for method in ("GET", "DELETE"):
            refused = server.client.request(method, f"{PRESETS}/{name}")
            assert error_of(refused) == (404, "unknown_preset", "name")
    assert ask(server, "/v1/completions", model="new").status_code == 404


def steered_by(server: Server, preset: str) -> Features:
    server.recorder.engine.params.clear()
    assert ask(server, "/v1/completions", model=preset).status_code == 200
    return steered(server)


def test_presets_are_listed_by_name(server: Server) -> None:
    server.client.put(f"{PRESETS}/alert", json=CALM)
    listed = server.client.get(PRESETS).json()
    assert listed["object"] == "list"
    assert [(e["name"], e["description"]) for e in listed["data"]] == [
        ("alert", None),
        ("calm", "less of it"),
    ]


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("a%20b", CALM, (400, "invalid_value", "name")),
        ("a%2Fb", CALM, (400, "invalid_value", "name")),
        ("a/b/c", CALM, (400, "invalid_value", "name")),
        ("x" * 65, CALM, (400, "invalid_value", "name")),
        ("tiny", CALM, (400, "invalid_value", "name")),
        ("new", {"interventions": []}, (400, "invalid_value", "steering.interventions")),
        ("new", {"steering": None}, (400, "invalid_type", "steering")),
        ("new", 3, (400, "invalid_type", "steering")),
        (
            "new",
            {"interventions": [{**EDIT, "unit": "max_act"}]},
            (400, "max_act_unknown", "steering.interventions[0].unit"),
        ),
    ],
)
def test_preset_is_refused_as_a_request_would_be(
    server: Server, name: str, body: Any, expected: Any
) -> None:
    assert error_of(server.client.put(f"{PRESETS}/{name}", json=body)) == expected


def test_preset_with_weights_that_are_not_finite_is_refused(
    begin: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = begin()
    catalog = app_state(server).steering.catalog
    monkeypatch.setattr(catalog, "_checked", {"a": set()})
    monkeypatch.setattr(type(catalog.sae("a")), "nonfinite_latents", lambda *_: [7])
    body = {"interventions": [{**EDIT, "feature": 7}]}
    refused = server.client.put(f"{PRESETS}/new", json=body)
    assert error_of(refused)[1] == "invalid_weights"


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff", b"[" * 5000])
def test_body_that_is_not_json_is_refused(server: Server, raw: bytes) -> None:
    assert error_of(server.client.put(f"{PRESETS}/new", content=raw))[:2] == (400, "invalid_value")


def test_without_a_folder_presets_are_read_only(start: StartServer, tmp_path: Path) -> None:
    file = tmp_path / "any.json"
    file.write_text(json.dumps(CALM))
    server = start(options={"steering_preset": [f"calm={file}"]})
    assert steered_by(server, "calm") == [(5, 1.0), (6, 2.0)]
    for name in ("calm", "new"):
        expected = (403, "presets_read_only", "name")
        assert error_of(server.client.put(f"{PRESETS}/{name}", json=CALM)) == expected
        assert error_of(server.client.delete(f"{PRESETS}/{name}")) == expected


def test_folder_that_cannot_be_written_to_is_read_only(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", fail)
    monkeypatch.setattr(Path, "unlink", fail)
    expected = (403, "presets_read_only", "name")
    assert error_of(server.client.put(f"{PRESETS}/new", json=CALM)) == expected
    assert error_of(server.client.delete(f"{PRESETS}/calm")) == expected


def test_preset_of_the_command_line_is_read_only(
    begin: Callable[..., Server], tmp_path: Path
) -> None:
    file = tmp_path / "any.json"
    file.write_text(json.dumps(CALM))
    server = begin(steering_preset=[f"fixed={file}"])
    expected = (403, "presets_read_only", "name")
    assert error_of(server.client.put(f"{PRESETS}/fixed", json=CALM)) == expected
    assert error_of(server.client.delete(f"{PRESETS}/fixed")) == expected
    assert server.client.delete(f"{PRESETS}/calm").status_code == 204


def test_server_without_presets_lists_none(start: StartServer) -> None:
    none: dict[str, Any] = {}
    for saes in (None, none):
        server = start(saes=saes)
        assert server.client.get(PRESETS).json() == {"object": "list", "data": []}
        assert error_of(server.client.get(f"{PRESETS}/calm"))[:2] == (404, "unknown_preset")
        refused = server.client.put(f"{PRESETS}/calm", json=CALM)
        assert error_of(refused)[:2] == (403, "presets_read_only")


def test_presets_ask_for_the_key(begin: Callable[..., Server]) -> None:
    client = begin("--api-key", "k").client
    for method, path in (
        ("GET", PRESETS),
        ("GET", f"{PRESETS}/calm"),
        ("PUT", f"{PRESETS}/calm"),
        ("DELETE", f"{PRESETS}/calm"),
    ):
        assert client.request(method, path).status_code == 401
        headers = {"Authorization": "Bearer k"}
        assert client.request(method, path, headers=headers).status_code != 401
