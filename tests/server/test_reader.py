"""Texts through the engine: what it is asked, how much at a time, and who may leave early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from vllm.exceptions import RetryableRequestError
from vllm.outputs import CompletionOutput, RequestOutput

from sae.source import ResolvedSAE
from server.disconnect import unless_disconnected
from steering.config import SteeringConfig
from steering.errors import SteeringError
from steering.request.accepted import Accepted, accept
from steering.request.plan import SteeringPlan
from steering.vllm.door import catalog_for
from steering.vllm.giving_way import GivingWay
from steering.vllm.plugin import register
from steering.vllm.reader import IN_FLIGHT, LAST, Finished, Reader, Run, Text
from tests.models import D_MODEL, NUM_LAYERS
from tests.server.fakes import FakeCollector, FakeEngine

References = Callable[..., tuple[ResolvedSAE, ...]]
TEXT = Text((7, 8, 9), (10, 11))
EDIT = {"interventions": [{"feature": 5, "op": "add", "value": 1}], "report": True}


class WatchedEngine(FakeEngine):
    """Keeps every plan, and how many requests are in it at a time; may hold them until told."""

    def __init__(self, config: SteeringConfig | None) -> None:
        super().__init__(config)
        self.seen: list[SteeringPlan] = []
        self.running = self.most = self.left_early = 0
        self.go = asyncio.Event()
        self.go.set()

    def summary(self, plan: SteeringPlan, child: int) -> Any:
        self.seen.append(plan)
        return super().summary(plan, child)

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        self.running += 1
        self.most = max(self.most, self.running)
        finished = False
        try:
            await asyncio.sleep(0)
            await self.go.wait()
            async for output in super().generate(*args, **kwargs):
                yield output
            finished = True
        finally:
            self.running -= 1
            self.left_early += not finished


@pytest.fixture
def engine(references: References) -> WatchedEngine:
    register()  # reports come to whoever asked through what it puts around the engine
    return WatchedEngine(SteeringConfig(references(a={}), D_MODEL, NUM_LAYERS))


def accepted(engine: WatchedEngine, field: dict[str, Any] = EDIT) -> Accepted:
    return accept(field, catalog_for(engine.vllm_config))


async def test_whole_text_is_the_prompt_and_its_completion_is_generation(
    engine: WatchedEngine,
) -> None:
    finished = await Reader(engine).run(Run.of(TEXT, accepted(engine)))
    assert engine.prompts[0]["prompt_token_ids"] == [7, 8, 9, 10, 11]
    assert engine.params[0].max_tokens == 1
    assert engine.params[0].skip_reading_prefix_cache is True
    assert engine.priorities == [LAST]
    (plan,) = engine.seen
    assert (plan.prompt_len, plan.awaited) == (3, True)
    assert finished.report is not None
    assert finished.report.interventions[0]["tokens_edited"] == 4


async def test_last_token_of_a_scored_text_does_not_enter(engine: WatchedEngine) -> None:
    await Reader(engine).run(Run.of(TEXT, accepted(engine), last_enters=False))
    assert engine.prompts[0]["prompt_token_ids"] == [7, 8, 9, 10]
    assert engine.seen[0].prompt_len == 3


async def test_text_without_a_completion_is_a_prompt(engine: WatchedEngine) -> None:
    await Reader(engine).run(Run.of(Text((7, 8)), accepted(engine)))
    assert engine.seen[0].prompt_len == 2


async def test_unsteered_run_has_no_report(engine: WatchedEngine) -> None:
    finished = await Reader(engine).run(Run.of(TEXT, prompt_logprobs=1, salt="apart"))
    assert finished.report is None
    assert finished.output.finished
    assert engine.params[0].extra_args is None
    assert engine.params[0].prompt_logprobs == 1
    assert engine.prompts[0]["cache_salt"] == "apart"


async def test_few_runs_are_in_flight_and_all_are_told_in_their_order(
    engine: WatchedEngine,
) -> None:
    progress: list[int] = []
    runs = [Run.of(Text((n, n + 1))) for n in range(3 * IN_FLIGHT)]
    found = await Reader(engine).all(iter(runs), progress.append)
    assert [f.output.prompt_token_ids[0] for f in found] == list(range(3 * IN_FLIGHT))
    assert engine.most == IN_FLIGHT
    assert progress == list(range(1, 3 * IN_FLIGHT + 1))


async def test_runs_of_studies_give_way_and_what_a_client_waits_for_does_not(
    engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = AsyncMock(return_value=[])
    monkeypatch.setattr("steering.vllm.reader.ask_workers", calls)
    way = GivingWay(lambda: 1 + engine.running, tokens=10**6, share=1.0)
    reader = Reader(engine, way=way)
    engine.go.clear()
    study = asyncio.create_task(reader.all([Run.of(TEXT)] * 3))
    inspected = asyncio.create_task(reader.run(replace(Run.of(TEXT), priority=0)))
    while engine.running < 2:
        await asyncio.sleep(0)
    computed = asyncio.create_task(reader.ask(0, "steering_compare"))
    async with asyncio.timeout(10):
        await reader.ask(0, "steering_forget", computes=False)
    assert (engine.most, calls.await_count) == (2, 1)
    engine.go.set()
    async with asyncio.timeout(10):
        await asyncio.gather(study, inspected, computed)
    assert (engine.most, calls.await_count) == (2, 2)
    assert sorted(engine.priorities) == [0, LAST, LAST, LAST]


async def test_runs_leave_the_engine_with_whoever_waits_for_them(engine: WatchedEngine) -> None:
    engine.go.clear()
    study = asyncio.create_task(Reader(engine).all([Run.of(TEXT)] * 20))
    while engine.running < IN_FLIGHT:
        await asyncio.sleep(0)
    study.cancel()
    with pytest.raises(asyncio.CancelledError):
        await study
    assert (engine.running, engine.left_early) == (0, IN_FLIGHT)


async def test_text_that_the_engine_drops_is_no_answer(
    engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropped(collector: FakeCollector) -> Any:
        choice = CompletionOutput(0, "", [], None, None, finish_reason="abort")
        return RequestOutput(collector.request_id, None, [7], None, [choice], finished=True)

    monkeypatch.setattr(FakeCollector, "get_nowait", dropped)
    for run in (Run.of(TEXT), Run.of(TEXT, accepted(engine))):
        with pytest.raises(RetryableRequestError):
            await Reader(engine).run(run)


async def test_first_failure_ends_the_others(engine: WatchedEngine) -> None:
    long = {"read": {"top_k": 64}}
    engine.vllm_config.additional_config["steering"]["max_read_values"] = 64
    with pytest.raises(SteeringError, match="the limit is 64"):
        await Reader(engine).all([Run.of(TEXT), Run.of(TEXT, accepted(engine, long))] * 20)
    assert engine.running == 0
    assert len(engine.params) < 40


def client(*messages: str) -> Any:
    """A client of which these messages are all that comes; then it is silent."""
    waiting = list(messages)

    async def receive() -> dict[str, str]:
        if not waiting:
            await asyncio.Event().wait()
        return {"type": waiting.pop(0)}

    return SimpleNamespace(receive=receive)


async def test_work_ends_when_its_client_leaves(engine: WatchedEngine) -> None:
    engine.go.clear()
    work = Reader(engine).run(Run.of(TEXT))
    assert await unless_disconnected(client("http.request", "http.disconnect"), work) is None
    assert engine.running == 0


async def test_work_is_returned_to_a_client_that_stays(engine: WatchedEngine) -> None:
    found = await unless_disconnected(client(), Reader(engine).run(Run.of(TEXT)))
    assert isinstance(found, Finished)


async def test_what_goes_wrong_in_the_work_is_raised() -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await unless_disconnected(client(), fail())
