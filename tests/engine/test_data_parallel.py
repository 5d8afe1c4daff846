"""A server of two data-parallel ranks: both steer as one engine does, and report back."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.engine import server
from tests.engine.engine import Generated, tiny_engine
from tests.engine.server import LiveServer
from tests.engine.test_traps import tokens

# The first test to ask waits for the server.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RANKS: Final = 2
SAES: Final[tuple[dict[str, Any], ...]] = (
    {"layer": 0},
    {"layer": 3, "architecture": "standard", "seed": 1},
)
EDITS: Final[dict[str, Any]] = {
    "interventions": [
        {"sae": "a", "feature": 3, "op": "clamp", "value": 6},
        {"sae": "b", "feature": 5, "op": "add", "value": 4, "positions": {"prompt": False}},
    ],
    "report": True,
    "read": {"sae": "b", "top_k": 2},
}
ONLY_A: Final[dict[str, Any]] = {
    "interventions": [{"sae": "a", "feature": 9, "op": "scale", "value": 20}],
    "report": True,
}
FIELDS: Final = (None, EDITS, ONLY_A)
PROMPTS: Final = tuple(tokens(800 + i, 12 + 9 * i) for i in range(len(FIELDS)))
MAX_TOKENS: Final = 8
TEXT: Final = "the lazy dog"


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saes")


@pytest.fixture(scope="module")
def alone(
    tiny_model: Callable[[str], Path], saes: Path
) -> Iterator[tuple[list[Generated], dict[str, Path]]]:
    """The same requests on one engine, and the SAEs that it made."""
    engine = tiny_engine(tiny_model("llama"), saes, SAES)
    yield engine.generate(PROMPTS, FIELDS, MAX_TOKENS), engine.saes
    engine.shut_down()
    gc.collect()


@pytest.fixture(scope="module")
def ranks(
    alone: tuple[list[Generated], dict[str, Path]],
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveServer]:
    """The server; as many front ends as ranks, which is vLLM's default."""
    log = tmp_path_factory.mktemp("ranks") / "server.log"
    flags = {
        "--max-model-len": "256",
        "--data-parallel-size": str(RANKS),
        "--distributed-executor-backend": "uni",  # two processes less
    }
    running = server.start(
        tiny_model("llama"), alone[1], log, *chain(*flags.items()), "--no-steering-self-check"
    )
    try:
        server.wait_until_ready(running)
        yield running
    finally:
        running.stop()


def ask(ranks: LiveServer, rank: int | None, which: int) -> dict[str, Any]:
    """The completion of prompt `which`, on that rank or on the one that vLLM chooses."""
    response = ranks.client.post(
        "/v1/completions",
        headers={} if rank is None else {"X-data-parallel-rank": str(rank)},
        json={
            **{"model": server.MODEL, "prompt": PROMPTS[which], "temperature": 0},
            **{"max_tokens": MAX_TOKENS, "ignore_eos": True, **server.TOKENS_AND_LOGPROBS},
            **({} if FIELDS[which] is None else {"steering": FIELDS[which]}),
        },
    )
    assert response.status_code == 200, response.text
    return dict(response.json())


def assert_is(answer: dict[str, Any], expected: Generated) -> None:
    (choice,) = answer["choices"]
    assert choice["token_ids"] == expected.tokens
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected.logprobs, abs=2e-4)
    if expected.steering is None:
        assert "steering" not in answer
        return
    (result,) = expected.steering
    for ours, theirs in zip(answer["steering"]["interventions"], result.interventions, strict=True):
        assert ours == {
            key: pytest.approx(value, rel=1e-3) if "activation" in key else value
            for key, value in theirs.items()
        }
    assert ("read" in answer["steering"]) == (result.read is not None)
    if result.read is not None:
        ours, theirs = (
            [(token["position"], token["id"], token["phase"]) for token in read["tokens"]]
            for read in (answer["steering"]["read"], result.read)
        )
        assert ours == theirs


def series(ranks: LiveServer, name: str) -> dict[str, float]:
    """The samples of one of vLLM's series by engine."""
    text = httpx.get(f"{ranks.base_url}/metrics").text
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith(f"{name}{{"):
            engine = line.partition('engine="')[2].partition('"')[0]
            found[engine] = found.get(engine, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("which", range(len(FIELDS)))
def test_each_rank_answers_as_one_engine_does(
    ranks: LiveServer,
    alone: tuple[list[Generated], dict[str, Path]],
    rank: int,
    which: int,
) -> None:
    name = "vllm:generation_tokens_total"
    before = series(ranks, name)
    assert_is(ask(ranks, rank, which), alone[0][which])
    moved = {engine: count - before[engine] for engine, count in series(ranks, name).items()}
    assert moved == {str(other): MAX_TOKENS * (other == rank) for other in range(RANKS)}


def test_a_mixed_crowd_over_both_ranks_is_answered_as_alone(
    ranks: LiveServer, alone: tuple[list[Generated], dict[str, Path]]
) -> None:
    name = "vllm:request_success_total"
    before = series(ranks, name)
    crowd = [which for _ in range(8) for which in range(len(FIELDS))]
    with ThreadPoolExecutor(len(crowd)) as pool:
        for which, answer in zip(
            crowd, pool.map(lambda which: ask(ranks, None, which), crowd), strict=True
        ):
            assert_is(answer, alone[0][which])
    after = series(ranks, name)
    served = [after[str(rank)] - before[str(rank)] for rank in range(RANKS)]
    assert sum(served) == len(crowd)
    assert min(served) > 0


def test_steering_series_add_up_over_the_ranks(ranks: LiveServer) -> None:
    before = ranks.metrics()
    assert before["steering_slots_capacity"] == RANKS * server.MAX_NUM_SEQS
    assert before["steering_rows_capacity"] == RANKS * 4096
    for rank in range(RANKS):
        ask(ranks, rank, 2)
    after = ranks.metrics()
    # Of each prompt all but the first token, and of the generated ones all but the last.
    report = ask(ranks, None, 2)["steering"]["interventions"][0]
    assert (
        after["steering_edited_tokens_total"] - before["steering_edited_tokens_total"]
        == RANKS * report["tokens_edited"]
    )
    scaled = 'steering_requests_total{op="scale",sae="a"}'
    assert after[scaled] - before[scaled] == RANKS


def test_inspect_finds_the_features_wherever_it_runs(ranks: LiveServer) -> None:
    bodies = []
    for rank in range(RANKS):
        for _ in range(3):
            response = ranks.client.post(
                "/v1/saes/b/inspect",
                headers={"X-data-parallel-rank": str(rank)},
                json={"prompt": TEXT, "top_k": 3},
            )
            assert response.status_code == 200, response.text
            bodies.append(response.json())
    assert len(bodies[0]["tokens"]) > 1
    assert all(body == bodies[0] for body in bodies)


def test_both_sides_of_a_comparison_meet_on_one_rank(ranks: LiveServer) -> None:
    texts = [{"prompt": prompt, "completion": tokens(900, 9)[1:]} for prompt in PROMPTS]
    configurations = [
        {"name": "edits", "steering": EDITS},
        {"name": "control", "steering": {"interventions": []}},
    ]

    def evaluated(texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        body = {"texts": texts, "configurations": configurations, "features": [{"sae": "a"}]}
        response = ranks.client.post("/v1/steering/evaluate", json=body)
        assert response.status_code == 200, response.text
        return list(response.json()["configurations"])

    name = "vllm:request_success_total"
    before = series(ranks, name)
    together = evaluated(texts)
    after = series(ranks, name)
    assert min(after[str(rank)] - before[str(rank)] for rank in range(RANKS)) > 0
    each = [evaluated([text]) for text in texts]
    for i, found in enumerate(together):
        kl = [of_text[i]["kl"]["mean"] for of_text in each]
        assert found["kl"]["mean"] == pytest.approx(sum(kl) / len(kl), abs=1e-5)
        (read,) = found["features"]
        assert (read["newly_active"] + read["silenced"] > 0) == (i == 0)
    assert together[0]["kl"]["mean"] > 1e-3 > 1e-6 > together[1]["kl"]["max"]
    assert ranks.metrics()["steering_results_held"] == 0
