"""Hundreds of requests at once, clients that leave, and more than fits: no answer ever changes.

`VLLM_SAE_LONG=1` repeats every part with other requests; `tests.engine.soak_run` goes on for hours.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import httpx
import pytest

from tests.engine import traffic
from tests.engine.server import LiveServer, start, wait_until_ready
from tests.engine.traffic import Body, Case

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS: Final = 10 if os.environ.get("VLLM_SAE_LONG") else 1
STREAMS: Final = 256
#: Rows for a dozen of these requests at most: steered ones wait for each other all the time.
MAX_ROWS: Final = 64
#: What vLLM takes in before it refuses with 503.
MAX_IN_FLIGHT: Final = STREAMS + 16
FLAGS: Final = (
    *("--max-model-len", "256", "--max-num-seqs", "32", "--steering-max-rows", str(MAX_ROWS)),
    *("--max-num-queued-reqs", str(MAX_IN_FLIGHT), "--no-steering-self-check"),
)


@dataclass(frozen=True)
class Busy:
    """A server on a tiny model, and requests whose answers are known."""

    server: LiveServer
    cases: list[Case]


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    folder = tmp_path_factory.mktemp("load")
    model, saes = traffic.make_model(folder), traffic.make_saes(folder)
    server = start(model, saes, folder / "server.log", *FLAGS)
    try:
        wait_until_ready(server)
        yield Busy(server, traffic.take_alone(server, traffic.make_bodies(0, 40 * ROUNDS)))
    finally:
        server.stop()


def assert_nothing_is_left(server: LiveServer) -> None:
    left = traffic.wait_until_idle(server)
    assert not any(left.values()), f"{left}\n{server.last_log_lines()}"


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_256_streams_at_once_answer_as_each_does_alone(busy: Busy, seed: int) -> None:
    rng = random.Random(seed)
    cases = rng.choices(busy.cases, k=STREAMS)
    assert {case.steered for case in cases} == {True, False}
    answers = asyncio.run(traffic.send_all(busy.server, cases, at_once=STREAMS))
    assert not traffic.wrong(cases, answers)
    assert_nothing_is_left(busy.server)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_clients_that_leave_disturb_nobody_and_leave_nothing_behind(busy: Busy, seed: int) -> None:
    rng = random.Random(100 + seed)
    cases = rng.choices(busy.cases, k=48)

    async def both() -> tuple[list[traffic.Answer], int]:
        return await asyncio.gather(
            traffic.send_all(busy.server, cases, at_once=16),
            traffic.storm(busy.server, busy.cases, 160, 32, rng),
        )

    answers, begun = asyncio.run(both())
    assert not traffic.wrong(cases, answers)
    assert 0 < begun < 160, "clients left neither before nor after the first byte"
    assert_nothing_is_left(busy.server)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_more_than_fits_is_refused_and_the_rest_answered_rightly(busy: Busy, seed: int) -> None:
    cases = random.Random(200 + seed).choices(busy.cases, k=MAX_IN_FLIGHT + 512)
    answers = asyncio.run(traffic.send_all(busy.server, cases, at_once=len(cases)))
    taken = [i for i, a in enumerate(answers) if a.status != httpx.codes.SERVICE_UNAVAILABLE]
    assert len(taken) < len(cases), "nothing was refused"
    assert not traffic.wrong([cases[i] for i in taken], [answers[i] for i in taken])
    assert_nothing_is_left(busy.server)


def test_requests_whose_rows_do_not_fit_beside_each_other_wait_their_turn(busy: Busy) -> None:
    rng = random.Random(300)
    bodies = [_wide(rng) for _ in range(8)]
    cases = traffic.take_alone(busy.server, bodies) * 3
    bystanders = [case for case in busy.cases if not case.steered]
    mixed = [case for pair in zip(cases, bystanders * 9, strict=False) for case in pair]
    answers = asyncio.run(traffic.send_all(busy.server, mixed, at_once=len(mixed)))
    assert not traffic.wrong(mixed, answers)
    assert_nothing_is_left(busy.server)


def _wide(rng: random.Random) -> Body:
    """A request with more edits than half of all rows: no two of these run together."""
    features = rng.sample(range(traffic.D_SAE), MAX_ROWS // 2 + 8)
    edits = [{**traffic.edit("relu", f, rng), "op": "add", "value": 0.2} for f in features]
    prompt = [rng.randrange(4, 300) for _ in range(12)]
    return {
        **traffic.PLAIN,
        "prompt": prompt,
        "max_tokens": 8,
        "steering": {"interventions": edits},
    }
