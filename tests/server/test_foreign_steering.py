"""Routes that cannot steer refuse a request to, rather than ignore it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.middleware import refuse_foreign
from steering.errors import SteeringError
from steering.request.misplaced import CONTAINERS
from tests.server.conftest import Server, StartServer

#: Any catalog that is not empty: what it holds makes no difference to a route that cannot steer.
CATALOG: Any = SimpleNamespace(names=("a",))
STEERING = {"interventions": [{"feature": 5, "op": "ablate"}]}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
bodies = st.dictionaries(
    # The rest is misplaced, and tested as that.
    st.text(max_size=8).filter(lambda key: key.lower() != "steering" and key not in CONTAINERS),
    json_values,
)


def spelled(escaped: list[bool]) -> str:
    """The key `steering` in JSON, some of its characters as escapes."""
    characters = zip("steering", escaped, strict=True)
    return "".join(f"\\u00{ord(c):02X}" if escape else c for c, escape in characters)


@given(
    body=bodies,
    escaped=st.lists(st.booleans(), min_size=8, max_size=8),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]),
)
def test_steering_is_found_however_it_is_spelled(
    body: dict[str, Any], escaped: list[bool], encoding: str
) -> None:
    text = json.dumps({**body, "MARK": STEERING}).replace("MARK", spelled(escaped))
    with pytest.raises(SteeringError) as refused:
        refuse_foreign(text.encode(encoding), CATALOG)
    assert (refused.value.code, refused.value.param) == ("unsupported_combination", "steering")


@given(body=bodies)
def test_body_without_steering_passes(body: dict[str, Any]) -> None:
    refuse_foreign(json.dumps({**body, "steering": None}).encode(), CATALOG)


@given(body=st.binary())
def test_any_bytes_pass_or_are_refused(body: bytes) -> None:
    refuse_foreign(b'{"steering' + body, CATALOG)


def test_key_deep_in_a_body_is_somebody_elses() -> None:
    refuse_foreign(json.dumps({"input": {"steering": 1}, "text": '"steering"'}).encode(), CATALOG)


def test_form_field_is_found() -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="steering"\r\n\r\n{}\r\n--x--\r\n'
    with pytest.raises(SteeringError):
        refuse_foreign(form, CATALOG)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/batch",
        "/v1/completions/render",
        "/v1/embeddings",
        "/v1/messages/count_tokens",
        "/v1/saes/a/inspect",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/score",
        "/tokenize",
    ],
)
def test_route_that_cannot_steer_refuses(server: Server, path: str) -> None:
    response = server.client.post(path, json={"model": "tiny", "prompt": "x", "steering": STEERING})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_combination"
    assert response.json()["error"]["param"] == "steering"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"steering": STEERING}),
        ("/v1/chat/completions/batch", {"steering": STEERING}),
        ("/inference/v1/generate", {"vllm_xargs": {"steering": "x"}}),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "vllm_xargs": {"steering": "x"}}),
    ],
)
def test_without_an_sae_it_is_the_server_that_cannot_steer(
    start: StartServer, path: str, body: dict[str, Any]
) -> None:
    response = start(saes={}).client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "steering_unavailable"


@pytest.mark.parametrize("key", ["steering_plan", "steering_ticket", "steering_inspect"])
def test_engines_own_arguments_are_refused(server: Server, key: str) -> None:
    for body, param in (
        ({"sampling_params": {"extra_args": {key: 1}}}, f"sampling_params.extra_args.{key}"),
        ({"vllm_xargs": {key: "x"}}, f"vllm_xargs.{key}"),
    ):
        response = server.client.post("/inference/v1/generate", json=body)
        assert response.json()["error"]["param"] == param


def test_route_reads_its_body_as_ever(server: Server) -> None:
    response = server.client.post("/tokenize", json={"prompt": 5})
    assert response.status_code == 400
    assert "steering" not in response.text
