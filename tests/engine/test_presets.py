"""Presets on a real server with two front ends: what clients that can only name a model get."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import pytest
from openai import OpenAI

from tests.demo_sae import ELVES
from tests.engine.server import MODEL, LiveServer, serving

# The first test to ask waits for the server.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FRONT_ENDS: Final = 2
#: Within which every front end has seen a change.
SEEN: Final = 1.0
EDIT: Final = {"sae": "l14", "feature": ELVES, "op": "clamp", "value": 1.5, "unit": "max_act"}
ELVISH: Final[dict[str, Any]] = {"interventions": [EDIT]}
#: The same feature from another side: where it stands in a prompt makes a difference.
LATE: Final[dict[str, Any]] = {"interventions": [EDIT], "positions": {"start": 40}}
OFF: Final[dict[str, Any]] = {"interventions": []}
ASKED: Final[list[Any]] = [{"role": "user", "content": "Tell me about your day."}]
#: Longer than a few blocks of the prefix cache.
TEXT: Final = " ".join(f"On day {i} it rained in the hills and the river rose." for i in range(40))
#: What lm-eval's local-completions sends to score a text.
SCORED: Final = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
PRESETS: Final = "/v1/steering/presets"


@pytest.fixture(scope="module")
def served(
    demo_model: Path, demo_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """SmolLM2 with a preset of each source; one of them is the default."""
    folder = tmp_path_factory.mktemp("presets")
    kept = folder / "kept"
    kept.mkdir()
    (kept / "late.json").write_text(json.dumps({"steering": LATE, "description": "late"}))
    file = folder / "file.json"
    file.write_text(json.dumps(ELVISH))
    flags = (
        *("--api-server-count", str(FRONT_ENDS), "--no-steering-self-check"),
        *("--steering-preset", f"elvish={file}", "--steering-presets", str(kept)),
        *("--steering-default", "elvish"),
    )
    with serving(demo_model, {"l14": demo_sae}, folder / "server.log", *flags) as running:
        yield running


def answer(served: LiveServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = served.post(path, body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def score(served: LiveServer, model: str, steering: Any = None) -> list[float]:
    """The log-probabilities of a text's tokens after the first, as lm-eval reads them."""
    body = {"model": model, "prompt": TEXT[:200], **SCORED}
    if steering is not None:
        body["steering"] = steering
    content = answer(served, "/v1/completions", body)
    assert content["model"] == model
    (choice,) = content["choices"]
    logprobs: list[Any] = choice["logprobs"]["token_logprobs"]
    assert logprobs[0] is None and len(logprobs) == content["usage"]["prompt_tokens"] + 1
    return logprobs[1:-1]


def test_preset_is_the_field_and_shares_its_cache(served: LiveServer) -> None:
    body = {"prompt": TEXT, "max_tokens": 12, "logprobs": 1}
    field = answer(served, "/v1/completions", {**body, "steering": {**LATE, "report": True}})
    preset = answer(
        served, "/v1/completions", {**body, "model": "late", "steering": {"report": True}}
    )
    assert (field["model"], preset["model"]) == (MODEL, "late")
    assert preset["choices"] == field["choices"]
    assert preset["usage"]["completion_tokens"] == field["usage"]["completion_tokens"]
    assert field["steering"]["tokens_cached"] == 0
    assert preset["steering"]["tokens_cached"] > 0


def test_default_steers_the_base_until_a_request_opts_out(served: LiveServer) -> None:
    body = {"messages": ASKED, "max_tokens": 16, "logprobs": True}
    by_default, by_name, off = (
        answer(served, "/v1/chat/completions", {**body, **more})
        for more in ({}, {"model": "elvish"}, {"steering": OFF})
    )
    assert [each["model"] for each in (by_default, by_name, off)] == [MODEL, "elvish", MODEL]
    assert by_default["choices"] == by_name["choices"]
    assert off["choices"][0]["message"]["content"] != by_name["choices"][0]["message"]["content"]
    never = {"sae": "l14", "feature": ELVES, "above": 1e6}
    nowhere = {"interventions": [{**EDIT, "when": never}]}
    held_back = answer(served, "/v1/chat/completions", {**body, "steering": nowhere})
    assert off["choices"] == held_back["choices"]


def test_openai_sdk_sees_the_presets_and_names_one(served: LiveServer) -> None:
    client = OpenAI(base_url=f"{served.base_url}/v1", api_key="x", timeout=120, max_retries=0)
    names = [model.id for model in client.models.list().data]
    assert names == [MODEL, "elvish", "late"]
    ask = client.chat.completions.create
    whole = ask(model="elvish", messages=ASKED, temperature=0, max_tokens=8)
    chunks = list(ask(model="elvish", messages=ASKED, temperature=0, max_tokens=8, stream=True))
    assert {chunk.model for chunk in chunks} == {whole.model} == {"elvish"}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    reported = ask(
        model="elvish", messages=ASKED, max_tokens=4, extra_body={"steering": {"report": True}}
    )
    (entry,) = (reported.model_extra or {})["steering"]["interventions"]
    assert entry["feature"] == ELVES and entry["tokens_edited"] > 3
    with pytest.raises(openai.NotFoundError):
        ask(model="dwarvish", messages=ASKED, max_tokens=4)


def test_log_likelihoods_of_a_preset_are_those_of_the_field(served: LiveServer) -> None:
    preset, field, off = (
        score(served, "elvish"),
        score(served, MODEL, ELVISH),
        score(served, MODEL, OFF),
    )
    assert preset == field
    assert max(abs(a - b) for a, b in zip(preset, off, strict=True)) > 0.1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": ASKED, "max_tokens": 4}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 4}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 4}),
        ("/v1/messages", {"messages": ASKED, "max_tokens": 4}),
    ],
)
def test_response_is_called_by_the_presets_name(
    served: LiveServer, path: str, body: dict[str, Any], stream: bool
) -> None:
    body = {**body, "model": "late", "stream": stream}
    text = served.post(path, body).text.replace('": "', '":"')
    assert '"model":"late"' in text and f'"model":"{MODEL}"' not in text


def test_preset_is_the_base_where_texts_are_only_tokenized(served: LiveServer) -> None:
    for path, body in (
        ("/tokenize", {"prompt": TEXT}),
        ("/detokenize", {"tokens": [504, 6641, 1102]}),
        ("/v1/messages/count_tokens", {"messages": ASKED}),
    ):
        as_preset, as_base = (
            served.client.post(path, json={**body, "model": model}) for model in ("late", MODEL)
        )
        assert as_preset.status_code == 200, as_preset.text
        assert as_preset.json() == as_base.json()
        assert served.client.post(path, json={**body, "model": "l8"}).status_code == 404


def test_route_that_cannot_steer_refuses_name_and_default(served: LiveServer) -> None:
    body = {"messages": [ASKED, ASKED], "max_tokens": 2}
    path = "/v1/chat/completions/batch"
    assert served.post(path, {**body, "model": "late"}).status_code == 404
    refused = served.post(path, body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")


def statuses(served: LiveServer, name: str) -> set[int]:
    """What many connections are answered about a preset: each may be another front end's."""
    found = set()
    for _ in range(8 * FRONT_ENDS):
        with httpx.Client(base_url=served.base_url, timeout=60) as client:
            found.add(client.get(f"{PRESETS}/{name}").status_code)
    return found


def test_every_front_end_sees_a_change_within_a_second(served: LiveServer) -> None:
    body = {"steering": LATE, "description": "new"}
    assert served.client.put(f"{PRESETS}/new", json=body).status_code == 201
    time.sleep(SEEN)
    assert statuses(served, "new") == {200}
    assert answer(served, "/v1/completions", {"model": "new", "prompt": "hi"})["model"] == "new"
    assert served.client.delete(f"{PRESETS}/new").status_code == 204
    time.sleep(SEEN)
    assert statuses(served, "new") == {404}
    assert served.client.delete(f"{PRESETS}/elvish").status_code == 403
