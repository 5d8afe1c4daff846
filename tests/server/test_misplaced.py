"""`steering` where nothing would read it is refused on every route, never ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.request.misplaced import CONTAINERS, MAX_PATH_CHARS, misplaced
from tests.server.bodies import BODIES
from tests.server.conftest import Server, StartServer

STEERING: dict[str, Any] = {"interventions": [{"feature": 5, "op": "ablate"}]}

#: What is added to a right body, and the path that its refusal names.
MISPLACED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"in {container}": ({container: {"steering": STEERING}}, f"{container}.steering")
        for container in CONTAINERS
    },
    "deep in metadata": ({"metadata": {"a": {"b": {"steering": "x"}}}}, "metadata.a.b.steering"),
    "in the engine's arguments of extra_body": (
        {"extra_body": {"sampling_params": {"extra_args": {"steering": STEERING}}}},
        "extra_body.sampling_params.extra_args.steering",
    ),
    "in a list": (
        {"extra_args": {"all": [1, {"steering": STEERING}]}},
        "extra_args.all[1].steering",
    ),
    "in another case": ({"Steering": STEERING}, "Steering"),
    "in capitals": ({"STEERING": STEERING}, "STEERING"),
    "in another case and place": ({"extra_body": {"Steering": 1}}, "extra_body.Steering"),
    "beside a right one": (
        {"steering": STEERING, "metadata": {"steering": "x"}},
        "metadata.steering",
    ),
}

routes = pytest.mark.parametrize("path", BODIES)


def error_of(response: Any) -> tuple[str, str]:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["code"], error["param"]


@pytest.mark.parametrize("case", MISPLACED)
@routes
def test_misplaced_steering_is_refused_with_its_path(server: Server, path: str, case: str) -> None:
    more, param = MISPLACED[case]
    response = server.client.post(path, json={**BODIES[path], **more})
    assert error_of(response) == ("misplaced_steering", param)
    assert server.recorder.requests == []


@pytest.mark.parametrize("case", ["in metadata", "in extra_body", "in vllm_xargs", "in capitals"])
@routes
def test_without_an_sae_the_right_place_would_not_help(
    start: StartServer, path: str, case: str
) -> None:
    server = start(saes={})
    more, param = MISPLACED[case]
    response = server.client.post(path, json={**BODIES[path], **more})
    assert error_of(response) == ("steering_unavailable", param)
    assert server.recorder.requests == []


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/chat/completions/batch", "/v1/completions/render", "/v1/saes/a/inspect"),
        *("/inference/v1/generate", "/invocations", "/tokenize"),
    ],
)
@pytest.mark.parametrize("case", MISPLACED)
def test_other_routes_refuse_it_as_well(server: Server, path: str, case: str) -> None:
    more, param = MISPLACED[case]
    response = server.client.post(path, json={"prompt": "x", **more})
    expected = ("misplaced_steering", param)
    if "steering" in more:
        expected = ("unsupported_combination", "steering")
    assert error_of(response) == expected


@routes
def test_what_only_looks_like_it_passes(server: Server, path: str) -> None:
    more: dict[str, Any] = {
        "extra_body": {"steering": None, "steering_wheel": 1, "x": "steering"},
        "metadata": {"topic": "steering"},
        "mine": {"steering": 1},
    }
    assert server.client.post(path, json={**BODIES[path], **more}).status_code == 200
    assert "steering" not in server.recorder.extra_args


def test_tool_may_have_an_argument_of_that_name(server: Server) -> None:
    parameters = {"type": "object", "properties": {"steering": {"type": "number"}}}
    tool = {"type": "function", "function": {"name": "drive", "parameters": parameters}}
    body = {**BODIES["/v1/chat/completions"], "tools": [tool], "tool_choice": "none"}
    assert server.client.post("/v1/chat/completions", json=body).status_code == 200


@routes
def test_unreadable_body_stays_its_routes_to_refuse(server: Server, path: str) -> None:
    for body in (b'{"metadata": {"steering', b"\xff\xfe", b"", b"[" * 100_000, b"7"):
        response = server.client.post(
            path, content=body, headers={"content-type": "application/json"}
        )
        assert 400 <= response.status_code < 500, body[:20]


json_values = st.recursive(
    st.none() | st.booleans() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "steering", "Steering"]), inner)
    ),
    max_leaves=12,
)


def paths_of(value: Any, path: str) -> list[str]:
    """By recursion, which the tested search does without."""
    found = []
    items = value.items() if isinstance(value, dict) else ()
    for key, item in items:
        if key.lower() == "steering" and item is not None:
            found.append(f"{path}.{key}")
        found += paths_of(item, f"{path}.{key}")
    for i, item in enumerate(value if isinstance(value, list) else ()):
        found += paths_of(item, f"{path}[{i}]")
    return found


@given(container=st.sampled_from(CONTAINERS), value=json_values)
def test_search_finds_one_exactly_where_there_is_one(container: str, value: Any) -> None:
    found = misplaced({container: value})
    expected = paths_of(value, container)
    if found is None:
        assert expected == []
    else:
        assert found in expected


def test_hostile_nesting_is_searched_once_and_its_path_is_cut() -> None:
    deep: Any = {"steering": 1}
    for _ in range(100_000):
        deep = {"k": [deep]}
    found = misplaced({"metadata": deep})
    assert found is not None
    assert len(found) == MAX_PATH_CHARS
    assert misplaced({"metadata": {"k" * 2**20: {"steering": 1}}}) is not None
    assert misplaced(json.loads('[{"steering": 1}]')) is None
