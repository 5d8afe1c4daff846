"""A server as others set it up: two front ends, a root path, priorities, float16, full rows, an
adapter, n-gram speculation.

One server has all of these settings; what each of them may break is asked of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.engine import server
from tests.engine.adapters import RANK, make_adapter
from tests.engine.reference import ReferenceModel
from tests.engine.server import LiveServer
from tests.engine.speculative import SPECULATIVE
from tests.models import make_tiny_sae

# The first test to ask waits for the server.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT: Final = "/llm"
FRONT_ENDS: Final = 2
MAX_ROWS: Final = 64
TEXT: Final = "the lazy dog"
FLAGS: Final = (
    *("--dtype", "float16", "--max-model-len", "256", "--root-path", ROOT),
    *("--api-server-count", str(FRONT_ENDS), "--scheduling-policy", "priority"),
    *("--steering-max-rows", str(MAX_ROWS), "--no-steering-self-check"),
    *("--distributed-executor-backend", "uni"),
    *("--enable-lora", "--max-lora-rank", str(RANK)),
    *("--speculative-config", json.dumps(SPECULATIVE)),
)
CLAMP: Final = {"feature": 3, "op": "clamp", "value": 6}
REPORTED: Final[dict[str, Any]] = {"interventions": [CLAMP], "report": True}
#: A random model says special tokens too; where these count, numbers are known beforehand.
EVERYWHERE: Final = {"positions": {"special_tokens": True}, "report": True}
BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 4},
    "/v1/completions": {"prompt": TEXT, "max_tokens": 4},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 4},
}

routes = pytest.mark.parametrize("path", BODIES)


@pytest.fixture(scope="module")
def settled(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """The server with all the settings."""
    folder = tmp_path_factory.mktemp("settings")
    saes, model = {"a": make_tiny_sae(folder / "a")}, tiny_model("llama")
    adapter = make_adapter(ReferenceModel(model, ()), folder / "adapter")
    preset = folder / "clamped.json"
    preset.write_text(json.dumps({"interventions": [CLAMP]}))
    flags = ("--lora-modules", f"adapter={adapter}", "--steering-preset", f"clamped={preset}")
    running = server.start(model, saes, folder / "server.log", *FLAGS, *flags)
    try:
        server.wait_until_ready(running)
        yield running
    finally:
        running.stop()


def fresh(settled: LiveServer, path: str, body: dict[str, Any]) -> httpx.Response:
    """Ask over a connection of its own, which the kernel gives to either front end."""
    request = {"model": server.MODEL, "temperature": 0, **body}
    return httpx.post(f"{settled.base_url}{path}", json=request, timeout=120, follow_redirects=True)


def edited(response: httpx.Response) -> int:
    """Tokens that the only edit of the only choice covered."""
    assert response.status_code == 200, response.text
    (entry,) = response.json()["steering"]["interventions"]
    return int(entry["tokens_edited"])


@routes
@pytest.mark.parametrize("prefix", ["", ROOT])
def test_behind_a_root_path_requests_are_steered_and_misplaced_steering_is_refused(
    settled: LiveServer, path: str, prefix: str
) -> None:
    assert edited(fresh(settled, prefix + path, {**BODIES[path], "steering": REPORTED})) > 2
    misplaced = fresh(settled, prefix + path, {**BODIES[path], "extra_body": {"steering": {}}})
    assert misplaced.status_code == 400
    assert misplaced.json()["error"]["code"] == "misplaced_steering"
    assert misplaced.json()["error"]["param"] == "extra_body.steering"


@routes
@pytest.mark.parametrize("prefix", ["", ROOT])
@pytest.mark.parametrize("end", ["/", "//"])
def test_slash_at_the_end_never_leads_to_an_unsteered_answer(
    settled: LiveServer, path: str, prefix: str, end: str
) -> None:
    body = {**BODIES[path], "steering": REPORTED}
    answer = fresh(settled, prefix + path + end, body)
    assert answer.status_code >= 400 or edited(answer) > 2


@pytest.mark.parametrize("prefix", ["", ROOT])
def test_routes_that_cannot_steer_refuse_behind_a_root_path(
    settled: LiveServer, prefix: str
) -> None:
    for path in (
        "/tokenize",
        "/invocations",
        "/v1/chat/completions/batch",
        "/inference/v1/generate",
    ):
        body = {"prompt": TEXT, "token_ids": [5], "sampling_params": {}, "steering": REPORTED}
        answer = fresh(settled, prefix + path, body)
        assert answer.status_code == 400, path
        assert answer.json()["error"]["code"] == "unsupported_combination"


def test_each_front_end_reports_its_own_requests_and_the_series_are_sums(
    settled: LiveServer,
) -> None:
    series = 'steering_requests_total{op="cap",sae="a"}'
    before = settled.metrics().get(series, 0.0)
    cap = {"interventions": [{"feature": 3, "op": "cap", "value": 0}], **EVERYWHERE}
    asked = 24
    lengths = [2 + i % 5 for i in range(asked)]

    def ask(length: int) -> int:
        body = {"prompt": [50 + i for i in range(length)], "max_tokens": 3, "ignore_eos": True}
        return edited(fresh(settled, "/v1/completions", {**body, "steering": cap}))

    with ThreadPoolExecutor(8) as pool:
        # The prompt, and all but the last of the answer.
        assert [*pool.map(ask, lengths)] == [length + 2 for length in lengths]
    for _ in range(4):  # whichever front end answers
        text = httpx.get(f"{settled.base_url}/metrics", timeout=60).text
        (value,) = [line.split()[-1] for line in text.splitlines() if line.startswith(series)]
        assert float(value) == before + asked


def test_full_rows_and_several_choices_wait_their_turn_by_priority(settled: LiveServer) -> None:
    # Two of these do not fit into the rows together.
    def edits(first: int) -> list[dict[str, Any]]:
        return [{"feature": first + i, "op": "add", "value": 0.5} for i in range(40)]

    def ask(i: int) -> httpx.Response:
        body = {"prompt": [60 + i, 61, 62], "max_tokens": 6, "n": 2, "seed": i, "ignore_eos": True}
        field = {"interventions": edits(8 * i), **EVERYWHERE}
        more = {"temperature": 0.9, "priority": i % 3, "steering": field}
        return fresh(settled, "/v1/completions", {**body, **more})

    with ThreadPoolExecutor(10) as pool:
        answers = [*pool.map(ask, range(10))]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]
        for choice in answer.json()["steering"]["choices"]:
            assert [e["tokens_edited"] for e in choice["interventions"]] == [3 + 5] * 40


@pytest.mark.parametrize("value", [1e6, -1e6])
@pytest.mark.parametrize("op", ["clamp", "add"])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_edit_past_the_range_of_float16_is_answered_or_refused(
    settled: LiveServer, op: str, value: float, logprobs: int | None
) -> None:
    field = {"interventions": [{"feature": 3, "op": op, "value": value}], "report": True}
    body = {"prompt": TEXT, "max_tokens": 4, "logprobs": logprobs, "steering": field}
    for stream in (False, True):
        answer = fresh(settled, "/v1/completions", {**body, "stream": stream})
        assert answer.status_code in (200, 400), answer.text
        assert not stream or answer.status_code == 400 or "[DONE]" in answer.text
    plain = fresh(settled, "/v1/completions", {"prompt": TEXT, "max_tokens": 4})
    assert plain.status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "", "max_tokens": 2}),
        ("/v1/completions", {"prompt": [], "max_tokens": 2}),
        ("/v1/completions", {"prompt": ["", TEXT], "max_tokens": 2}),
        ("/v1/completions", {"prompt": [[]], "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [], "max_tokens": 2}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": ""}], "max_tokens": 2},
        ),
        ("/v1/responses", {"input": "", "max_output_tokens": 2}),
        ("/v1/responses", {"input": [], "max_output_tokens": 2}),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": ""}], "max_tokens": 2},
        ),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_empty_prompt_is_answered_or_refused(
    settled: LiveServer, path: str, body: dict[str, Any]
) -> None:
    answer = fresh(settled, path, {**body, "steering": REPORTED})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        assert "steering" in answer.json()


def test_null_content_beside_a_tool_call_is_answered(settled: LiveServer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ]
    body = {"messages": messages, "max_tokens": 2, "steering": REPORTED}
    answer = fresh(settled, "/v1/chat/completions", body)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        assert edited(answer) > 2


# --- an adapter -----------------------------------------------------------------------------------


@routes
def test_adapter_by_its_name_is_steered_by_the_field_and_by_no_preset(
    settled: LiveServer, path: str
) -> None:
    # One after the other: vLLM's CPU build mixes up an adapter and the base in one batch.
    adapted = fresh(settled, path, {**BODIES[path], "model": "adapter", "steering": REPORTED})
    assert edited(adapted) > 2
    assert adapted.json()["model"] == "adapter"
    plain = fresh(settled, path, {**BODIES[path], "model": "adapter"})
    assert plain.status_code == 200
    assert "steering" not in plain.json()
    reported = {**BODIES[path], "model": "clamped", "steering": {"report": True}}
    preset = fresh(settled, path, reported)
    assert edited(preset) > 2
    assert preset.json()["model"] == "clamped"


def test_adapter_and_edit_both_make_a_difference(settled: LiveServer) -> None:
    found = []
    for model in (server.MODEL, "adapter"):
        for more in ({}, {"steering": REPORTED}):
            body = {**BODIES["/v1/completions"], "model": model, "logprobs": 1, **more}
            answer = fresh(settled, "/v1/completions", body).json()
            found.append(answer["choices"][0]["logprobs"]["token_logprobs"][0])
    assert len({round(logprob, 3) for logprob in found}) == 4
    listed = fresh_models(settled)
    assert listed == {server.MODEL: None, "adapter": server.MODEL, "clamped": server.MODEL}


def fresh_models(settled: LiveServer) -> dict[str, str | None]:
    """The models that are listed, and their parents."""
    listed = httpx.get(f"{settled.base_url}/v1/models", timeout=60).json()["data"]
    return {model["id"]: model["parent"] for model in listed}


# --- speculation ----------------------------------------------------------------------------------


def test_steered_tokens_are_counted_once_under_speculation(settled: LiveServer) -> None:
    before = drafted(settled)
    ids = [50 + i % 4 for i in range(40)]
    body = {"prompt": ids, "max_tokens": 60, "ignore_eos": True}
    steering = {"interventions": [CLAMP], **EVERYWHERE}
    answer = fresh(settled, "/v1/completions", {**body, "steering": steering})
    assert edited(answer) == len(ids) + 60 - 1
    assert drafted(settled) > before


def drafted(settled: LiveServer) -> float:
    """Tokens that were proposed so far."""
    text = httpx.get(f"{settled.base_url}/metrics", timeout=60).text
    name = "vllm:spec_decode_num_draft_tokens_total"
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))
