"""A real server over HTTP: refusals, reports, reads, caching, batches, SAE routes, metrics, log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests import demo_sae

if TYPE_CHECKING:
    from tests.engine.server import LiveServer

pytest_plugins = ("tests.engine.server",)
# The first test to ask waits for the server.
pytestmark = pytest.mark.timeout(600)

PARIS: Final = "What is the capital of France?"
#: "The snow fell on the elves of the forest." as token ids; the first is a position of its own.
ELVES: Final = [504, 6641, 1102, 1099, 282, 260, 2935, 30]
FANTASY: Final = {"sae": "l14", "feature": demo_sae.ELVES, "op": "clamp", "value": 40}
STRONG: Final = {"interventions": [FANTASY]}
OTHER: Final = {"interventions": [{"sae": "second", "feature": 5, "op": "add", "value": 60}]}

BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/completions": {"prompt": PARIS, "max_tokens": 4},
    "/v1/responses": {"input": PARIS, "max_output_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": PARIS}], "max_tokens": 4},
}


def test_null_means_left_out(live_server: LiveServer) -> None:
    plain = live_server.choice(ELVES)
    body = {"prompt": ELVES, "max_tokens": 8, "logprobs": 1, "return_token_ids": True}
    nothing = live_server.post("/v1/completions", {**body, "steering": None})
    assert "steering" not in nothing.json()
    assert nothing.json()["choices"][0]["token_ids"] == plain["token_ids"]
    spelled_out = {
        "interventions": [{**FANTASY, "unit": None, "positions": None}],
        "positions": {"start": None, "end": None, "prompt": None},
        "error_term": None,
        "report": None,
        "read": None,
    }
    steered = live_server.choice(ELVES, STRONG)
    assert steered["token_ids"] != plain["token_ids"]
    again = live_server.complete(ELVES, spelled_out, logprobs=1, return_token_ids=True)
    assert "steering" not in again.json()
    assert again.json()["choices"][0]["token_ids"] == steered["token_ids"]


# Reports and reads

REPORTED: Final[dict[str, Any]] = {
    "interventions": [
        {"sae": "l14", "feature": demo_sae.ELVES, "op": "clamp", "value": 1.5, "unit": "max_act"},
        {
            "sae": "second",
            "feature": 7,
            "op": "scale",
            "value": 2,
            "positions": {"prompt": False},
        },
        {"sae": "l14", "feature": 3, "op": "ablate", "positions": {"end": 4}},
    ],
    "report": True,
}
ENTRY_FIELDS: Final = {
    *("sae", "feature", "op", "value", "effective_value", "tokens_edited", "tokens_skipped"),
    *("tokens_active", "mean_activation", "max_activation"),
}


def test_report_counts_the_positions_that_each_edit_covered(live_server: LiveServer) -> None:
    response = live_server.complete(ELVES, REPORTED, max_tokens=5, ignore_eos=True)
    steering = response.json()["steering"]
    assert steering.keys() == {"interventions", "tokens_cached", "edited"}
    assert steering["tokens_cached"] == 0
    clamp, scale, ablate = steering["interventions"]
    assert all(entry.keys() == ENTRY_FIELDS for entry in (clamp, scale, ablate))
    # 8 tokens of prompt, of which the first is left alone, and 4 of the 5 generated.
    assert [e["tokens_edited"] for e in (clamp, scale, ablate)] == [7 + 4, 4, 3]
    assert [e["tokens_skipped"] for e in (clamp, scale, ablate)] == [0, 0, 0]
    assert clamp["value"] == 1.5
    assert clamp["effective_value"] == pytest.approx(1.5 * demo_sae.ELVES_MAX_ACTIVATION)
    assert (scale["value"], scale["effective_value"]) == (2.0, 2.0)
    assert (ablate["value"], ablate["effective_value"]) == (0.0, 0.0)
    assert 0 < clamp["tokens_active"] < 11
    assert 0 < clamp["mean_activation"] < clamp["max_activation"]


CONDITIONED: Final[dict[str, Any]] = {
    "interventions": [
        {"sae": "l14", "feature": demo_sae.ELVES, "op": "clamp", "value": 1.5, "unit": "max_act"},
        {"sae": "second", "feature": 7, "op": "add", "value": 1, "when": "always"},
    ],
    "when": {"any": [{"sae": "l14", "feature": demo_sae.ELVES, "above": 0.3, "unit": "max_act"}]},
    "positions": {"start": -7},
    "protect": [{"sae": "l14", "feature": 5}],
    "max_share": 0.05,
    "report": True,
}


def test_report_has_what_conditions_protection_and_limits_did(live_server: LiveServer) -> None:
    def told(steering: dict[str, Any], **more: Any) -> dict[str, Any]:
        response = live_server.complete(
            ELVES, steering, max_tokens=5, **{"ignore_eos": True, **more}
        )
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()["steering"]
        return found

    steering = told(CONDITIONED)
    assert steering.keys() == {"interventions", "tokens_cached", "edited", "protected"}
    held, always = steering["interventions"]
    assert held.keys() == ENTRY_FIELDS | {"tokens_held_back"}
    assert always.keys() == ENTRY_FIELDS
    assert held["tokens_edited"] > 0 < held["tokens_held_back"]
    assert held["tokens_edited"] + held["tokens_held_back"] == always["tokens_edited"] == 7 + 4
    assert held["tokens_active"] == held["tokens_edited"]
    assert steering["protected"].keys() == {"norm_kept", "gain_kept"}
    assert 0 < steering["protected"]["norm_kept"] <= 1
    assert steering["protected"]["gain_kept"] > 0
    at_14, at_20 = steering["edited"]
    for entry in (at_14, at_20):
        assert entry.keys() == {"hook", "tokens", "mean_share", "max_share", "tokens_limited"}
        assert 0 < entry["mean_share"] <= entry["max_share"] < 0.05001
    assert (at_14["tokens"], at_20["tokens"]) == (held["tokens_edited"], always["tokens_edited"])
    assert at_14["tokens_limited"] > 0

    nowhere = {"sae": "second", "feature": 7, "above": 1e5, "scope": "prompt"}
    off = {**CONDITIONED, "positions": {"prompt": False}, "when": nowhere}
    off["interventions"] = CONDITIONED["interventions"][:1]
    (held,) = (quiet := told(off))["interventions"]
    assert (held["tokens_edited"], held["tokens_held_back"]) == (0, 4)
    assert (held["mean_activation"], quiet["edited"]) == (None, [])
    several = told(off, n=2, temperature=0.8, seed=1)
    assert all(
        choice.keys() == {"index", *steering} and choice["protected"] == quiet["protected"]
        for choice in several["choices"]
    )


def test_scoring_a_prompt_reports_the_same_twice(live_server: LiveServer) -> None:
    # As evaluation harnesses ask for log-probabilities: batched ids, nothing generated.
    body = {"max_tokens": 0, "echo": True, "logprobs": 1}
    first, second = (live_server.complete([ELVES], REPORTED, **body) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200), first.text
    assert first.json()["steering"] == second.json()["steering"]
    clamp, scale, ablate = first.json()["steering"]["interventions"]
    assert [e["tokens_edited"] for e in (clamp, scale, ablate)] == [7, 0, 3]
    logprobs = [r.json()["choices"][0]["logprobs"]["token_logprobs"] for r in (first, second)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    assert len(logprobs[0]) == len(ELVES)


def test_several_choices_are_reported_one_by_one(live_server: LiveServer) -> None:
    body = {"n": 2, "temperature": 0.8, "seed": 3, "max_tokens": 6, "ignore_eos": True}
    response = live_server.chat(PARIS, REPORTED, **body)
    assert len(response.json()["choices"]) == 2
    choices = response.json()["steering"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    for choice in choices:
        assert choice.keys() == {"index", "interventions", "tokens_cached", "edited"}
        assert choice["interventions"][1]["tokens_edited"] == 5


def test_several_prompts_are_reported_in_their_order(live_server: LiveServer) -> None:
    prompts = [ELVES, ELVES[:5], ELVES[:3]]
    body = {"max_tokens": 3, "ignore_eos": True, "n": 2, "temperature": 0.8, "seed": 1}
    steering = {"interventions": [FANTASY], "report": True}
    response = live_server.complete(prompts, steering, **body).json()
    assert [choice["index"] for choice in response["choices"]] == [*range(6)]
    choices = response["steering"]["choices"]
    assert [choice["index"] for choice in choices] == [*range(6)]
    counted = [choice["interventions"][0]["tokens_edited"] for choice in choices]
    assert counted == [7 + 2, 7 + 2, 4 + 2, 4 + 2, 2 + 2, 2 + 2]


def test_read_gives_the_strongest_features_of_each_covered_token(live_server: LiveServer) -> None:
    steering = {"read": {"sae": "l14", "top_k": 3}, "positions": {"start": 2}}
    response = live_server.complete(
        ELVES, steering, max_tokens=3, ignore_eos=True, return_token_ids=True
    ).json()
    assert response["steering"].keys() == {"read"}
    read = response["steering"]["read"]
    assert read["sae"] == "l14"
    ids = [*ELVES, *response["choices"][0]["token_ids"]]
    assert [t["position"] for t in read["tokens"]] == [*range(2, 10)]
    assert [t["id"] for t in read["tokens"]] == ids[2:10]
    assert [t["phase"] for t in read["tokens"]] == ["prompt"] * 6 + ["generation"] * 2
    for token in read["tokens"]:
        values = [value for _, value in token["features"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[-1] > 0


def test_report_and_read_come_together(live_server: LiveServer) -> None:
    steering = {**REPORTED, "read": {"sae": "second"}}
    found = live_server.chat(PARIS, steering).json()["steering"]
    assert found.keys() == {"interventions", "tokens_cached", "edited", "read"}
    assert found["read"]["sae"] == "second"
    assert max(len(token["features"]) for token in found["read"]["tokens"]) == 5


# Streams


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("usage", [True, False])
def test_streamed_report_is_the_last_chunk_before_done(
    live_server: LiveServer, usage: bool, n: int
) -> None:
    body = {"n": n, "temperature": 0.5, "seed": 5, "max_tokens": 5, "ignore_eos": True}
    options = {"stream_options": {"include_usage": True}} if usage else {}
    message = {"messages": [{"role": "user", "content": PARIS}]}
    *chunks, steering, done = live_server.stream(
        "/v1/chat/completions", {**message, **body, **options, "steering": REPORTED}
    )
    assert done == "[DONE]"
    assert steering["choices"] == []
    assert {"id", "object", "created", "model"} < steering.keys()
    assert steering["object"] == "chat.completion.chunk"
    assert steering["id"] == chunks[0]["id"]
    assert not any("steering" in chunk for chunk in chunks)
    if usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 5 * n
    else:
        assert all(chunk["choices"] for chunk in chunks)
    whole = live_server.chat(PARIS, REPORTED, **body).json()["steering"]
    assert steering["steering"].keys() == whole.keys()
    assert ("choices" in whole) == (n > 1)


def test_streamed_completion_reports_every_prompt(live_server: LiveServer) -> None:
    steering = {"interventions": [FANTASY], "report": True}
    body = {"prompt": [ELVES, ELVES[:4]], "max_tokens": 3, "ignore_eos": True}
    *_, last, _ = live_server.stream("/v1/completions", {**body, "steering": steering})
    assert last["object"] == "text_completion"
    choices = last["steering"]["choices"]
    assert [c["interventions"][0]["tokens_edited"] for c in choices] == [7 + 2, 3 + 2]


def test_responses_and_messages_report_at_their_ends(live_server: LiveServer) -> None:
    for path, body in BODIES.items():
        if path == "/v1/completions":
            continue
        whole = live_server.post(path, {**body, "steering": REPORTED})
        assert whole.status_code == 200, whole.text
        expected = whole.json()["steering"]
        assert [entry["op"] for entry in expected["interventions"]] == ["clamp", "scale", "ablate"]
        found = live_server.stream(path, {**body, "steering": REPORTED})
        *before, last = [event for event in found if event != "[DONE]"]
        response = last["response"] if path == "/v1/responses" else last
        assert response["steering"] == expected
        assert "steering" not in json.dumps(before)


def test_stream_that_is_left_early_frees_its_slot(live_server: LiveServer) -> None:
    body = {
        "model": "smollm2",
        "prompt": ELVES,
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
        "steering": {**STRONG, "report": True},
    }
    with live_server.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    # The slot is free once a pass has told the worker, which any other request brings about.
    for _ in range(20):
        live_server.complete(ELVES[:3], max_tokens=2)
        found = live_server.metrics()
        if found["steering_slots_in_use"] == 0:
            break
    assert (found["steering_slots_in_use"], found["steering_rows_in_use"]) == (0, 0)


# The prefix cache


def long_prompt(seed: int) -> list[int]:
    """200 ordinary tokens: one block of 128, and more."""
    return [1000 + (seed * 7919 + 131 * i) % 20000 for i in range(200)]


def test_equal_steering_shares_cached_blocks_and_says_how_many(live_server: LiveServer) -> None:
    prompt = long_prompt(1)
    steering = {"interventions": [FANTASY], "report": True}
    equal = {"interventions": [{**FANTASY, "value": 40.0, "unit": "raw"}], "report": True}
    first, second = (
        live_server.complete(prompt, s, max_tokens=2, return_token_ids=True).json()
        for s in (steering, equal)
    )
    cached = second["steering"]["tokens_cached"]
    assert first["steering"]["tokens_cached"] == 0
    assert cached == 128
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    assert second["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
    # What was served from the cache is not counted again.
    edited = [r["steering"]["interventions"][0]["tokens_edited"] for r in (first, second)]
    assert edited == [199 + 1, 200 - cached + 1]


def test_different_steering_shares_nothing(live_server: LiveServer) -> None:
    prompt = long_prompt(2)
    for steering in (None, STRONG, OTHER, {"interventions": [{**FANTASY, "value": 41}]}):
        body = live_server.complete(prompt, steering, max_tokens=1).json()
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, steering
    again = live_server.complete(prompt, None, max_tokens=1).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 128


def test_clean_request_after_a_steered_one_is_clean(live_server: LiveServer) -> None:
    prompt = long_prompt(3)
    clean = live_server.choice(prompt, cache_salt="one")
    steered = live_server.choice(prompt, STRONG)
    after = live_server.choice(prompt)
    assert steered["token_ids"] != clean["token_ids"]
    assert after["token_ids"] == clean["token_ids"]
    assert after["logprobs"]["token_logprobs"] == pytest.approx(
        clean["logprobs"]["token_logprobs"], abs=1e-4
    )


def test_read_sees_prompt_tokens_that_are_cached(live_server: LiveServer) -> None:
    prompt = long_prompt(4)
    live_server.complete(prompt, max_tokens=1)
    found = live_server.complete(
        prompt, {"read": {"sae": "second", "top_k": 1}}, max_tokens=1
    ).json()
    assert [t["position"] for t in found["steering"]["read"]["tokens"]] == [*range(1, 200)]


# Batches


def test_requests_of_a_mixed_batch_are_what_they_are_alone(live_server: LiveServer) -> None:
    fields: Sequence[Any] = (
        None,
        STRONG,
        OTHER,
        {"interventions": [FANTASY, *OTHER["interventions"]], "error_term": False},
        {"interventions": [{**FANTASY, "positions": {"generation": False}}]},
        {"interventions": [{**FANTASY, "positions": {"prompt": False}}]},
    )
    requests = [([1000 + 37 * i, *ELVES[: 4 + i % 4]], fields[i % len(fields)]) for i in range(12)]
    body = {"max_tokens": 8, "ignore_eos": True}
    alone = [live_server.choice(prompt, field, **body) for prompt, field in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = [*pool.map(lambda request: live_server.choice(*request, **body), requests)]
    for one, other in zip(alone, together, strict=True):
        assert one["token_ids"] == other["token_ids"]
        assert one["logprobs"]["token_logprobs"] == pytest.approx(
            other["logprobs"]["token_logprobs"], abs=1e-3
        )
    # One request's edits in another's place would have shown.
    texts = {tuple(choice["token_ids"]) for choice in alone}
    assert len(texts) > len(requests) // 2


# SAE routes


def test_cards_of_all_saes_are_listed(live_server: LiveServer) -> None:
    body = live_server.client.get("/v1/saes").json()
    assert body["object"] == "list"
    by_id = {card["id"]: card for card in body["data"]}
    assert [*by_id] == ["l14", "second", "twin", "topk"]
    card = by_id["l14"]
    assert {k: card[k] for k in ("hook", "layer", "architecture", "d_in", "d_sae", "format")} == {
        "hook": "blocks.14.hook_resid_post",
        "layer": 14,
        "architecture": "jumprelu",
        "d_in": 576,
        "d_sae": 4608,
        "format": "sae_lens",
    }
    assert (card["sink_norm"], card["has_labels"], card["has_max_activations"]) == (
        2000,
        True,
        True,
    )
    assert (by_id["twin"]["sink_norm"], by_id["twin"]["has_labels"]) == (None, False)
    assert live_server.client.get("/v1/saes/twin").json() == by_id["twin"]


def test_checksum_is_there_once_it_was_needed(live_server: LiveServer) -> None:
    import hashlib

    live_server.complete(ELVES, OTHER, max_tokens=1)
    weights = live_server.saes["second"] / "sae_weights.safetensors"
    card = live_server.client.get("/v1/saes/second").json()
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_features_are_searched_and_shown(live_server: LiveServer) -> None:
    found = live_server.client.get("/v1/saes/l14/features", params={"query": "elves"}).json()
    assert found["data"][0]["feature"] == demo_sae.ELVES
    page = live_server.client.get("/v1/saes/l14/features?limit=2&offset=4606").json()
    assert [feature["feature"] for feature in page["data"]] == [4606, 4607]
    assert (page["total"], page["has_more"]) == (4608, False)
    feature = live_server.client.get(f"/v1/saes/l14/features/{demo_sae.ELVES}").json()
    assert feature["max_activation"] == demo_sae.ELVES_MAX_ACTIVATION
    for list_name in ("nearest", "promoted", "suppressed"):
        assert len(feature[list_name]) == 10
    cosines = [cosine for _, cosine in feature["nearest"]]
    assert cosines == sorted(cosines, reverse=True)
    assert feature["promoted"][0][1] > 0 > feature["suppressed"][0][1]


# Metrics and log


def test_series_move_with_what_happens(live_server: LiveServer) -> None:
    before = live_server.metrics()
    for name in (
        'steering_requests_total{op="cap",sae="twin"}',
        'steering_rejected_total{code="unsupported_op"}',
        *("steering_slots_in_use", "steering_rows_in_use", "steering_op_seconds_total"),
    ):
        assert name in before
    assert before["steering_slots_capacity"] == 8
    assert before["steering_rows_capacity"] == 4096
    steering = {
        "interventions": [
            {"sae": "twin", "feature": 1, "op": "cap", "value": 0.5},
            {"sae": "twin", "feature": 2, "op": "cap", "value": 0.5},
            FANTASY,
            *OTHER["interventions"],
        ],
        "read": {"sae": "second"},
    }
    body = {"max_tokens": 3, "ignore_eos": True}
    assert live_server.complete(ELVES, steering, **body).status_code == 200
    assert live_server.complete(ELVES, {"read": {"sae": "nobody"}}).status_code == 400
    after = live_server.metrics()
    moved = {
        name: after[name] - value
        for name, value in before.items()
        if after[name] != value and "seconds" not in name
    }
    assert moved == {
        'steering_requests_total{op="cap",sae="twin"}': 1,
        'steering_requests_total{op="clamp",sae="l14"}': 1,
        'steering_requests_total{op="add",sae="second"}': 1,
        'steering_requests_total{op="read",sae="second"}': 1,
        'steering_rejected_total{code="unknown_sae"}': 1,
        # Of 8 + 2 tokens all but the first, at two hook points.
        "steering_edited_tokens_total": 2 * (7 + 2),
    }
    assert after["steering_op_seconds_total"] > before["steering_op_seconds_total"]


def test_log_holds_no_text_of_requests(live_server: LiveServer) -> None:
    secret = "Xylophonquarz"
    for steering in (STRONG, {"interventions": [{"sae": secret, "feature": 1, "op": "ablate"}]}):
        live_server.chat(f"Say {secret}", steering)
        live_server.complete(secret, steering)
        live_server.complete(secret, steering, stream=True, cache_salt=secret, user=secret)
    live_server.client.post("/v1/saes/l14/inspect", json={"prompt": secret})
    live_server.client.post("/v1/saes/l14/inspect", json={"prompt": 5, secret: 1})
    live_server.chat(secret, {secret: 1})
    assert secret not in live_server.log.read_text(errors="replace")
