"""Every line of the contract's error table, from a real server, in the shape of each API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests import demo_sae

if TYPE_CHECKING:
    from tests.engine.server import LiveServer

pytest_plugins = ("tests.engine.server",)
pytestmark = pytest.mark.timeout(600)

PARIS: Final = "What is the capital of France?"
ELVES: Final = [504, 6641, 1102, 1099, 282, 260, 2935, 30]
EDIT: Final = {"sae": "l14", "feature": demo_sae.ELVES, "op": "clamp", "value": 1}
VALID: Final = {"interventions": [EDIT]}
FIRES: Final = {"sae": "l14", "feature": 1, "above": 0.5}


def edits(*changes: dict[str, Any]) -> dict[str, Any]:
    """A `steering` field of edits that differ from `EDIT`; a value of `...` leaves the key out."""
    return {
        "interventions": [
            {k: v for k, v in {**EDIT, **change}.items() if v is not ...} for change in changes
        ]
    }


# Every line of the error table: the field, the code, and the path below `steering`.
REFUSALS: Final[dict[str, tuple[Any, str, str]]] = {
    "unknown sae": (edits({"sae": "l15"}), "unknown_sae", ".interventions[0].sae"),
    "unknown sae to read": ({"read": {"sae": "l15"}}, "unknown_sae", ".read.sae"),
    "sae left out": (edits({"sae": ...}), "sae_required", ".interventions[0].sae"),
    "sae null": (edits({"sae": None}), "sae_required", ".interventions[0].sae"),
    "sae of the read left out": ({"read": {}}, "sae_required", ".read.sae"),
    "feature past the end": (
        edits({"feature": 4608}),
        "feature_out_of_range",
        ".interventions[0].feature",
    ),
    "feature negative": (
        edits({"feature": -1}),
        "feature_out_of_range",
        ".interventions[0].feature",
    ),
    "second edit's feature": (
        edits({}, {"sae": "second", "feature": 64}),
        "feature_out_of_range",
        ".interventions[1].feature",
    ),
    "feature true": (edits({"feature": True}), "invalid_type", ".interventions[0].feature"),
    "feature 1.5": (edits({"feature": 1.5}), "invalid_type", ".interventions[0].feature"),
    "feature 7.0": (edits({"feature": 7.0}), "invalid_type", ".interventions[0].feature"),
    "feature a string": (edits({"feature": "3"}), "invalid_type", ".interventions[0].feature"),
    "sae a number": (edits({"sae": 14}), "invalid_type", ".interventions[0].sae"),
    "value a string": (edits({"value": "1"}), "invalid_type", ".interventions[0].value"),
    "value true": (edits({"value": True}), "invalid_type", ".interventions[0].value"),
    "op a list": (edits({"op": ["clamp"]}), "invalid_type", ".interventions[0].op"),
    "report 1": ({**VALID, "report": 1}, "invalid_type", ".report"),
    "error_term a string": ({**VALID, "error_term": "no"}, "invalid_type", ".error_term"),
    "positions a list": ({**VALID, "positions": []}, "invalid_type", ".positions"),
    "positions.prompt 1": (
        {**VALID, "positions": {"prompt": 1}},
        "invalid_type",
        ".positions.prompt",
    ),
    "start 1.0": ({**VALID, "positions": {"start": 1.0}}, "invalid_type", ".positions.start"),
    "read true": ({"read": True}, "invalid_type", ".read"),
    "top_k a string": ({"read": {"sae": "l14", "top_k": "5"}}, "invalid_type", ".read.top_k"),
    "interventions an object": ({"interventions": {}}, "invalid_type", ".interventions"),
    "intervention a number": ({"interventions": [7]}, "invalid_type", ".interventions[0]"),
    "steering a list": ([], "invalid_type", ""),
    "steering true": (True, "invalid_type", ""),
    "unknown op": (edits({"op": "boost"}), "invalid_value", ".interventions[0].op"),
    "op left out": (edits({"op": ...}), "invalid_value", ".interventions[0].op"),
    "unknown unit": (edits({"unit": "sigma"}), "invalid_value", ".interventions[0].unit"),
    "value left out": (edits({"value": ...}), "invalid_value", ".interventions[0].value"),
    "value null": (edits({"value": None}), "invalid_value", ".interventions[0].value"),
    "value on ablate": (edits({"op": "ablate"}), "invalid_value", ".interventions[0].value"),
    "value NaN": (edits({"value": float("nan")}), "invalid_value", ".interventions[0].value"),
    "value Infinity": (edits({"value": float("inf")}), "invalid_value", ".interventions[0].value"),
    "value past the limit": (edits({"value": 1.01e6}), "invalid_value", ".interventions[0].value"),
    "max_act with scale": (
        edits({"op": "scale", "unit": "max_act"}),
        "invalid_value",
        ".interventions[0].unit",
    ),
    "top_k 0": ({"read": {"sae": "l14", "top_k": 0}}, "invalid_value", ".read.top_k"),
    "top_k 65": ({"read": {"sae": "l14", "top_k": 65}}, "invalid_value", ".read.top_k"),
    "start and end of one sign, crossed": (
        edits({"positions": {"start": -1, "end": -5}}),
        "invalid_value",
        ".interventions[0].positions",
    ),
    "start past int32": (
        {**VALID, "positions": {"start": -(2**31) - 1}},
        "invalid_value",
        ".positions.start",
    ),
    "both phases off": (
        edits({"positions": {"prompt": False, "generation": False}}),
        "invalid_value",
        ".interventions[0].positions",
    ),
    "empty window": (
        {**VALID, "positions": {"start": 5, "end": 5}},
        "invalid_value",
        ".positions",
    ),
    "unknown field": ({**VALID, "strength": 3}, "unknown_field", ".strength"),
    "unknown field of an edit": (edits({"layer": 3}), "unknown_field", ".interventions[0].layer"),
    "unknown field of positions": (
        {**VALID, "positions": {"tail": True}},
        "unknown_field",
        ".positions.tail",
    ),
    "unknown field of read": ({"read": {"sae": "l14", "k": 1}}, "unknown_field", ".read.k"),
    "one feature twice": (edits({}, {"value": 2}), "duplicate_intervention", ".interventions[1]"),
    "overlapping windows of one feature": (
        edits({"positions": {"end": 10}}, {"positions": {"start": 9}}),
        "duplicate_intervention",
        ".interventions[1]",
    ),
    "no recorded maximum": (
        edits({"sae": "second", "feature": 3, "unit": "max_act"}),
        "max_act_unknown",
        ".interventions[0].unit",
    ),
    "65 interventions": (
        edits(*({"feature": i} for i in range(65))),
        "too_many_interventions",
        ".interventions",
    ),
    "no interventions": ({"interventions": []}, "invalid_value", ".interventions"),
    "nothing at all": ({}, "invalid_value", ".interventions"),
    "report of nothing": ({"report": True}, "invalid_value", ".interventions"),
    "no error term at one hook of two SAEs": (
        {**edits({}, {"sae": "twin", "feature": 1}), "error_term": False},
        "unsupported_combination",
        ".error_term",
    ),
    "condition that is read later": (
        {**VALID, "when": {"sae": "second", "feature": 1, "above": 0}},
        "condition_too_late",
        ".when",
    ),
    "condition of an edit that is read later": (
        edits({"when": [FIRES, {**FIRES, "sae": "second", "feature": 1, "scope": "so_far"}]}),
        "condition_too_late",
        ".interventions[0].when",
    ),
    "condition of the prompt on the prompt": (
        {**VALID, "when": {**FIRES, "scope": "prompt"}},
        "invalid_value",
        ".when",
    ),
    "condition without a bound": (
        {**VALID, "when": {"sae": "l14", "feature": 1}},
        "invalid_value",
        ".when.above",
    ),
    "condition with two bounds": (
        {**VALID, "when": {**FIRES, "below": 1}},
        "invalid_value",
        ".when.below",
    ),
    "condition with a negative bound": (
        {**VALID, "when": {**FIRES, "above": -1}},
        "invalid_value",
        ".when.above",
    ),
    "no conditions": ({**VALID, "when": []}, "invalid_value", ".when"),
    "any of no conditions": ({**VALID, "when": {"any": []}}, "invalid_value", ".when.any"),
    "nine conditions": (
        {**VALID, "when": [{**FIRES, "feature": i} for i in range(9)]},
        "invalid_value",
        ".when",
    ),
    "condition of an unknown sae": (
        {**VALID, "when": [{**FIRES, "sae": "l15"}]},
        "unknown_sae",
        ".when[0].sae",
    ),
    "unknown field of a condition": (
        {**VALID, "when": {**FIRES, "op": "clamp"}},
        "unknown_field",
        ".when.op",
    ),
    "match unknown": ({**VALID, "match": "exact"}, "invalid_value", ".match"),
    "reread of topk": (
        {**edits({"sae": "topk", "feature": 1}), "match": "reread"},
        "unsupported_op",
        ".match",
    ),
    "reread at one hook of two SAEs": (
        {**edits({}, {"sae": "twin", "feature": 1}), "match": "reread"},
        "unsupported_combination",
        ".match",
    ),
    "reread of positions that differ": (
        {**edits({}, {"feature": 1, "positions": {"prompt": False}}), "match": "reread"},
        "unsupported_combination",
        ".match",
    ),
    "reread of what hardly moves": (
        {**edits({"sae": "second", "feature": 0}), "match": "reread"},
        "ill_conditioned",
        ".match",
    ),
    "protect what is edited": (
        {**VALID, "protect": [{"sae": "l14", "feature": demo_sae.ELVES}]},
        "unsupported_combination",
        ".protect[0]",
    ),
    "protect where nothing is edited": (
        {**VALID, "protect": [{"sae": "second", "feature": 1}]},
        "invalid_value",
        ".protect[0]",
    ),
    "max_share 0": ({**VALID, "max_share": 0}, "invalid_value", ".max_share"),
    "max_share 11": ({**VALID, "max_share": 11}, "invalid_value", ".max_share"),
    "max_share true": ({**VALID, "max_share": True}, "invalid_type", ".max_share"),
}

BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/completions": {"prompt": PARIS, "max_tokens": 4},
    "/v1/responses": {"input": PARIS, "max_output_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": PARIS}], "max_tokens": 4},
}

#: A sample of the table for the other routes, one of each code.
SAMPLE: Final = (
    "unknown sae",
    "sae left out",
    "feature past the end",
    "feature 7.0",
    "value NaN",
    "both phases off",
    "unknown field",
    "one feature twice",
    "no recorded maximum",
    "65 interventions",
    "no error term at one hook of two SAEs",
    "condition that is read later",
    "reread of what hardly moves",
)


def post(server: LiveServer, path: str, body: dict[str, Any]) -> Any:
    """Send what Python's JSON writes, NaN included, which httpx refuses to."""
    content = json.dumps({"model": "smollm2", "temperature": 0, **body})
    headers = {"content-type": "application/json"}
    return server.client.post(path, content=content, headers=headers)


def assert_refused(response: Any, code: str, param: str | None, status: int = 400) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("case", REFUSALS)
def test_chat_refuses_every_line_of_the_error_table(live_server: LiveServer, case: str) -> None:
    steering, code, below = REFUSALS[case]
    body = {"messages": [{"role": "user", "content": PARIS}], "max_tokens": 4, "steering": steering}
    assert_refused(post(live_server, "/v1/chat/completions", body), code, f"steering{below}")
    streamed = post(live_server, "/v1/chat/completions", {**body, "stream": True})
    assert_refused(streamed, code, f"steering{below}")


@pytest.mark.parametrize("path", BODIES)
def test_other_routes_refuse_in_the_shape_of_their_api(live_server: LiveServer, path: str) -> None:
    for case in SAMPLE:
        steering, code, below = REFUSALS[case]
        response = post(live_server, path, {**BODIES[path], "steering": steering})
        if path == "/v1/messages":
            assert response.status_code == 400
            assert response.json()["type"] == "error"
            error = response.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert (error["code"], error["param"]) == (code, f"steering{below}")
        else:
            assert_refused(response, code, f"steering{below}")


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
    ],
)
def test_beam_search_cannot_carry_steering(
    live_server: LiveServer, path: str, more: dict[str, Any]
) -> None:
    body = {**more, "use_beam_search": True, "n": 2, "max_tokens": 3, "steering": VALID}
    assert_refused(live_server.post(path, body), "unsupported_combination", "steering")


def test_route_that_cannot_steer_refuses_rather_than_ignores(live_server: LiveServer) -> None:
    response = live_server.post("/tokenize", {"prompt": PARIS, "steering": VALID})
    assert_refused(response, "unsupported_combination", "steering")


def test_refused_requests_leave_the_next_one_as_it_was(live_server: LiveServer) -> None:
    steered = {"interventions": [{**EDIT, "value": 40}]}
    before = live_server.choice(ELVES, steered)
    for case in SAMPLE:
        body = {"prompt": ELVES, "steering": REFUSALS[case][0]}
        assert post(live_server, "/v1/completions", body).status_code == 400
    after = live_server.choice(ELVES, steered)
    assert (after["token_ids"], after["logprobs"]) == (before["token_ids"], before["logprobs"])


@pytest.mark.parametrize(
    ("method", "path", "code", "param"),
    [
        ("GET", "/v1/saes/l15", "unknown_sae", "sae"),
        ("GET", "/v1/saes/l15/features", "unknown_sae", "sae"),
        ("GET", "/v1/saes/l15/features/1", "unknown_sae", "sae"),
        ("POST", "/v1/saes/l15/inspect", "unknown_sae", "sae"),
        ("GET", "/v1/saes/l14/features/4608", "feature_out_of_range", "feature"),
        ("GET", "/v1/saes/second/features/64", "feature_out_of_range", "feature"),
        ("GET", "/v1/saes/l14/features/-1", "feature_out_of_range", "feature"),
    ],
)
def test_unknown_names_in_a_path_are_not_found(
    live_server: LiveServer, method: str, path: str, code: str, param: str
) -> None:
    assert_refused(live_server.client.request(method, path), code, param, status=404)
