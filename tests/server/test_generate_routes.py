"""The four generating routes: what reaches the engine, and what comes back."""

from __future__ import annotations

import contextlib
import json
from http import HTTPStatus
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine.exceptions import EngineGenerateError

from steering.errors import SteeringError
from tests.server.bodies import BODIES
from tests.server.conftest import Server, StartServer
from tests.server.fakes import CHOICE, ENTRY, HEAD, READ

EDIT = {"feature": 5, "op": "clamp", "value": 1}
REPORTED = {"interventions": [EDIT], "report": True}
REPORT = {"interventions": [ENTRY], "tokens_cached": 2}

routes = pytest.mark.parametrize("path", BODIES)


def ask(server: Server, path: str, steering: Any, **more: Any) -> Any:
    return server.client.post(path, json={**BODIES[path], "steering": steering, **more})


def events(text: str) -> list[str]:
    return [event for event in text.split("\n\n") if event]


def data(event: str) -> Any:
    return json.loads(event.partition("data: ")[2])


# What reaches the engine


@routes
def test_unsteered_request_carries_nothing(server: Server, path: str) -> None:
    response = server.client.post(path, json=BODIES[path])
    assert response.status_code == 200
    assert "steering" not in response.json()
    assert server.recorder.extra_args == {}


@routes
def test_null_steering_is_left_out(start: StartServer, path: str) -> None:
    server = start(saes={})
    assert ask(server, path, None).status_code == 200
    assert server.recorder.extra_args == {}


@routes
def test_what_was_accepted_reaches_the_sampling_parameters(server: Server, path: str) -> None:
    steering = {"interventions": [{**EDIT, "value": 2.5, "sae": "a"}], "error_term": True}
    assert ask(server, path, steering).status_code == 200
    assert server.recorder.extra_args.keys() == {"steering"}
    (edit,) = server.recorder.accepted.spec.edits
    assert (edit.sae, edit.feature, edit.effective_value) == ("a", 5, 2.5)
    assert server.recorder.accepted.prepared.fingerprints.keys() == {"a"}


@routes
def test_other_extra_arguments_stay_beside_steering(server: Server, path: str) -> None:
    assert ask(server, path, {"interventions": [EDIT]}, vllm_xargs={"k": 1}).status_code == 200
    assert server.recorder.extra_args.keys() == {"k", "steering"}
    assert server.recorder.extra_args["k"] == 1


# What comes back


@routes
def test_request_that_asks_for_nothing_gets_nothing(server: Server, path: str) -> None:
    assert "steering" not in ask(server, path, {"interventions": [EDIT]}).json()


@routes
def test_report_is_a_field_of_the_response(server: Server, path: str) -> None:
    response = ask(server, path, REPORTED)
    assert response.json()["steering"] == REPORT
    assert int(response.headers["content-length"]) == len(response.content)


@routes
def test_read_alone_comes_without_a_report(server: Server, path: str) -> None:
    assert ask(server, path, {"read": {"top_k": 2}}).json()["steering"] == {"read": READ}


def test_several_choices_are_listed_by_index(server: Server) -> None:
    body = ask(server, "/v1/chat/completions", REPORTED, n=2).json()
    assert body["steering"] == {"choices": [{"index": 0, **REPORT}, {"index": 1, **REPORT}]}


@pytest.mark.parametrize("usage", [True, False])
def test_chat_stream_ends_with_a_chunk_of_its_own(server: Server, usage: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": usage}}
    *chunks, done = events(ask(server, "/v1/chat/completions", REPORTED, **options).text)
    assert done == "data: [DONE]"
    assert [("usage" in data(c), "steering" in data(c)) for c in chunks] == [
        (False, False),
        *([(True, False)] if usage else []),
        (False, True),
    ]
    assert data(chunks[-1]) == {**HEAD, "choices": [], "steering": REPORT}


def test_text_completion_stream_keeps_its_object(server: Server) -> None:
    *_, chunk, done = events(ask(server, "/v1/completions", REPORTED, stream=True).text)
    assert done == "data: [DONE]"
    assert data(chunk) == {**HEAD, "object": "text_completion", "choices": [], "steering": REPORT}


def test_responses_stream_completes_with_the_report(server: Server) -> None:
    created, completed = events(ask(server, "/v1/responses", REPORTED, stream=True).text)
    assert "steering" not in data(created)["response"]
    assert completed.startswith("event: response.completed\n")
    assert data(completed)["response"]["steering"] == REPORT


def test_messages_stream_stops_with_the_report(server: Server) -> None:
    *before, stop = events(ask(server, "/v1/messages", REPORTED, stream=True).text)
    assert not any("steering" in event for event in before)
    assert stop.startswith("event: message_stop\n")
    assert data(stop) == {"type": "message_stop", "steering": REPORT}


def test_stream_without_a_report_is_vllms(server: Server) -> None:
    text = ask(server, "/v1/chat/completions", {"interventions": [EDIT]}, stream=True).text
    assert [*map(data, events(text)[:-1])] == [{**HEAD, "choices": [CHOICE]}]


def test_broken_stream_has_no_report(server: Server) -> None:
    server.recorder.break_stream = True
    *_, error, done = events(ask(server, "/v1/chat/completions", REPORTED, stream=True).text)
    assert "error" in data(error)
    assert done == "data: [DONE]"


def test_vllms_own_refusal_passes_through(server: Server) -> None:
    server.recorder.error_response = create_error_response(
        "no such model", status_code=HTTPStatus.NOT_FOUND
    )
    response = ask(server, "/v1/chat/completions", REPORTED)
    assert response.status_code == 404


async def test_stream_ends_when_its_client_leaves(server: Server) -> None:
    body = json.dumps({**BODIES["/v1/completions"], "steering": REPORTED, "stream": True})
    received = [{"type": "http.request", "body": body.encode(), "more_body": False}]

    async def receive() -> Any:
        return received.pop() if received else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("the client has left")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
    }
    app: Any = server.client.app
    with contextlib.suppress(ClientDisconnect, OSError):
        await app(scope, receive, send)
    assert server.recorder.open_streams == 0


# Refusals

REFUSALS: list[tuple[Any, str, str]] = [
    ({"interventions": [{**EDIT, "sae": "b"}]}, "unknown_sae", "interventions[0].sae"),
    (
        {"interventions": [{**EDIT, "feature": 128}]},
        "feature_out_of_range",
        "interventions[0].feature",
    ),
    ({"interventions": [{**EDIT, "feature": 7.0}]}, "invalid_type", "interventions[0].feature"),
    ({"interventions": [{**EDIT, "feature": True}]}, "invalid_type", "interventions[0].feature"),
    ({"interventions": [{**EDIT, "value": True}]}, "invalid_type", "interventions[0].value"),
    ({"interventions": [{**EDIT, "op": "explode"}]}, "invalid_value", "interventions[0].op"),
    ({"interventions": [EDIT], "report": 1}, "invalid_type", "report"),
    ({"interventions": [EDIT], "positions": []}, "invalid_type", "positions"),
    ({"interventions": [EDIT], "strength": 1}, "unknown_field", "strength"),
    ({"interventions": [EDIT, EDIT]}, "duplicate_intervention", "interventions[1]"),
    (
        {"interventions": [{**EDIT, "unit": "max_act"}]},
        "max_act_unknown",
        "interventions[0].unit",
    ),
    ({"interventions": [EDIT] * 65}, "too_many_interventions", "interventions"),
    ({}, "invalid_value", "interventions"),
    ({"read": {"top_k": 65}}, "invalid_value", "read.top_k"),
]


@pytest.mark.parametrize(("steering", "code", "param"), REFUSALS)
def test_refusal_has_openais_shape(server: Server, steering: Any, code: str, param: str) -> None:
    response = ask(server, "/v1/chat/completions", steering)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.pop("message")
    assert response.json().keys() == {"error"}
    assert error == {"type": "invalid_request_error", "param": f"steering.{param}", "code": code}
    assert server.recorder.requests == []


def test_several_saes_must_be_told_apart(start: StartServer) -> None:
    server = start(saes={"a": {}, "b": {"seed": 1}})
    both = {"interventions": [{**EDIT, "sae": "a"}, {**EDIT, "sae": "b"}], "error_term": False}
    assert _refused(ask(server, "/v1/completions", {"interventions": [EDIT]})) == (
        "sae_required",
        "steering.interventions[0].sae",
    )
    assert _refused(ask(server, "/v1/completions", both)) == (
        "unsupported_combination",
        "steering.error_term",
    )


@routes
def test_server_without_saes_refuses_steering(start: StartServer, path: str) -> None:
    server = start(saes={})
    assert _refused(ask(server, path, REPORTED)) == ("steering_unavailable", "steering")
    assert server.recorder.requests == []


@routes
def test_streamed_request_is_refused_before_the_stream(server: Server, path: str) -> None:
    response = ask(server, path, {"interventions": [{**EDIT, "feature": -1}]}, stream=True)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert _refused(response) == ("feature_out_of_range", "steering.interventions[0].feature")


def test_messages_are_refused_in_anthropics_shape(server: Server) -> None:
    body = ask(server, "/v1/messages", {"report": True}).json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["code"] == "invalid_value"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_value_that_is_not_finite_is_refused(server: Server, number: str) -> None:
    response = _send(server, f'{{"interventions":[{{"feature":5,"op":"add","value":{number}}}]}}')
    assert _refused(response) == ("invalid_value", "steering.interventions[0].value")


@pytest.mark.parametrize(
    ("steering", "code"),
    [
        ("[" * 500 + "]" * 500, "invalid_type"),
        ("[" * 50_000 + "]" * 50_000, "invalid_value"),
        (
            '{"interventions":[{"feature":' + "9" * 4000 + ',"op":"ablate"}]}',
            "feature_out_of_range",
        ),
        ('{"interventions":[{"feature":' + "9" * 5000 + ',"op":"ablate"}]}', "invalid_value"),
        (r'{"\ud800":1}', "unknown_field"),
        (r'{"interventions":[{"feature":5,"op":"\ud800"}]}', "invalid_value"),
    ],
    ids=["nested", "too deep", "long", "too long", "surrogate key", "surrogate"],
)
def test_hostile_json_is_refused(server: Server, steering: str, code: str) -> None:
    response = _send(server, steering)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == code


@pytest.mark.parametrize(
    "key",
    ["steering_ticket", "steering_inspect", "steering_plan", "steering_span"],
)
@routes
def test_smuggled_arguments_are_refused(server: Server, path: str, key: str) -> None:
    response = ask(server, path, None, vllm_xargs={key: "x"})
    assert _refused(response) == ("unsupported_combination", f"vllm_xargs.{key}")
    assert server.recorder.requests == []


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"use_beam_search": True}),
        ("/v1/completions", {"use_beam_search": True}),
        ("/v1/completions", {"prompt_embeds": "AAAA"}),
        ("/v1/responses", {"background": True}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "A"}]}]},
        ),
    ],
)
def test_what_cannot_carry_steering_is_refused(server: Server, path: str, more: Any) -> None:
    assert _refused(ask(server, path, REPORTED, **more)) == ("unsupported_combination", "steering")
    assert server.recorder.requests == []


@pytest.mark.parametrize("wrapped", [True, False])
@routes
def test_refusal_inside_the_engine_comes_out_the_same_way(
    server: Server, path: str, wrapped: bool
) -> None:
    refusal = SteeringError("invalid_weights", "not finite", "steering.x")
    server.recorder.error = EngineGenerateError() if wrapped else refusal
    server.recorder.error.__cause__ = refusal if wrapped else None
    response = ask(server, path, REPORTED)
    assert _refused(response) == ("invalid_weights", "steering.x")
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [True, False])
@routes
def test_read_of_too_many_values_is_refused_before_a_stream_begins(
    start: StartServer, path: str, stream: bool
) -> None:
    read = {"read": {"top_k": 64}}
    values = (3 + 5) * 64  # of the prompt's tokens and five more
    server = start(max_read_values=values - 1)
    response = ask(server, path, read, stream=stream)
    assert _refused(response) == ("invalid_value", "steering.read")
    assert f"is {values} values, the limit is {values - 1}" in response.json()["error"]["message"]
    assert ask(start(max_read_values=values), path, read, stream=stream).status_code == 200


def test_row_with_weights_that_are_not_finite_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = server.client.app.state.steering.catalog  # type: ignore[attr-defined]
    monkeypatch.setattr(catalog, "_checked", {"a": set()})
    monkeypatch.setattr(catalog.sae("a"), "nonfinite_latents", list)
    assert _refused(ask(server, "/v1/chat/completions", REPORTED)) == (
        "invalid_weights",
        "steering.interventions[0].feature",
    )


# Around the routes


def test_api_key_is_asked_for_before_anything_is_read(start: StartServer) -> None:
    server = start("--api-key", "sesame")
    bad = {**BODIES["/v1/completions"], "steering": {"what": 1}}
    for path in ("/v1/completions", "/v1/embeddings", "/v1/saes/a/inspect"):
        assert server.client.post(path, json=bad).status_code == 401
    for path in ("/v1/saes", "/v1/saes/a", "/v1/saes/a/features", "/v1/saes/a/features/1"):
        assert server.client.get(path).status_code == 401
        keyed = server.client.get(path, headers={"authorization": "Bearer sesame"})
        assert keyed.status_code == 200


@routes
def test_openapi_shows_the_field(server: Server, path: str) -> None:
    schema = server.client.get("/openapi.json").json()
    content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schemas = schema["components"]["schemas"]

    def named(reference: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = schemas[reference["$ref"].rpartition("/")[2]]
        return found

    field = named(content["schema"])["properties"]["steering"]
    assert field["anyOf"][1] == {"type": "null"}
    steering = named(field["anyOf"][0])
    assert steering["additionalProperties"] is False
    assert steering["properties"].keys() == {
        *("interventions", "positions", "error_term", "match", "protect", "max_share"),
        *("when", "stop_when", "report", "read"),
    }
    intervention = named(steering["properties"]["interventions"]["anyOf"][0]["items"])
    assert intervention["required"] == ["feature", "op"]
    assert intervention["properties"]["feature"]["minimum"] == 0
    when = steering["properties"]["when"]["anyOf"]
    assert {"const": "always", "type": "string"} in when
    assert {"type": "null"} in when


def _send(server: Server, steering: str) -> Any:
    body = json.dumps(BODIES["/v1/completions"])[:-1] + f', "steering": {steering}}}'
    return server.client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )


def _refused(response: Any) -> tuple[str, str]:
    assert response.status_code == 400
    error = response.json()["error"]
    return error["code"], error["param"]
