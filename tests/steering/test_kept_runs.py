"""Runs of which something is kept: in groups, a few studies at a time, and forgotten at any end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any

import pytest

from steering.studies.kept_runs import MAX_HELD_ROWS, Calls, Held, KeptRun, in_groups
from steering.vllm.reader import Finished, Run, Text


class ListeningReader:
    """Finishes every run at once, one at a time, and listens to what workers are asked."""

    def __init__(
        self, engines: int = 1, *, external_blocks: bool = False, studies: int = 8
    ) -> None:
        self.keeping = asyncio.Semaphore(studies)
        self.engines = engines
        self.external_blocks = external_blocks
        self.runs: list[Run] = []
        self.asked: list[tuple[int, str, Any]] = []
        self.closed = 0

    async def ask(self, engine: int, method: str, *args: Any, computes: bool = True) -> list[Any]:
        self.asked.append((engine, method, *args))
        return []

    async def run(self, run: Run) -> Finished:
        self.runs.append(run)
        await asyncio.sleep(0)
        return Finished(None, None)

    async def each(self, runs: Iterable[Run]) -> AsyncGenerator[tuple[int, Finished], None]:
        try:
            for place, run in enumerate(runs):
                yield place, await self.run(run)
        finally:
            self.closed += 1

    async def all(
        self, runs: Iterable[Run], progress: Callable[[int], None] | None = None
    ) -> list[Finished]:
        return [await self.run(run) for run in runs]


def kept(rows: int = 2, engine: int = 0) -> KeptRun:
    text = Text((1,), tuple(range(5, 5 + rows)))
    return KeptRun(text, None, 0, rows, last_enters=False, engine=engine)


def test_groups_hold_as_many_rows_as_may_be_kept_or_one_run_of_more() -> None:
    runs = [kept(rows) for rows in (MAX_HELD_ROWS - 5, 3, 2, 1, MAX_HELD_ROWS + 7, 1)]
    assert list(in_groups(runs)) == [runs[:3], runs[3:4], runs[4:5], runs[5:]]
    assert list(in_groups([])) == []


async def test_what_was_not_dropped_is_forgotten_on_its_engine_at_the_end() -> None:
    reader = ListeningReader(engines=2)
    runs = [kept(), kept(engine=1), kept()]
    async with Held(reader) as held:
        async for run in held.each(runs):
            if run is runs[0]:
                held.dropped(0, [run.key])
    await asyncio.sleep(0)
    wanted = [(0, "steering_forget", [runs[2].key]), (1, "steering_forget", [runs[1].key])]
    assert sorted(reader.asked) == wanted
    assert [run.engine for run in reader.runs] == [0, 1, 0]


async def test_nothing_is_asked_where_everything_was_dropped() -> None:
    reader = ListeningReader()
    async with Held(reader) as held:
        async for run in held.each([kept(), kept()]):
            held.dropped(0, [run.key])
    await asyncio.sleep(0)
    assert reader.asked == []
    assert reader.runs[0].engine is None


@pytest.mark.parametrize("leave", ["break", "raise", "cancel"])
async def test_study_that_ends_early_has_what_it_began_forgotten(leave: str) -> None:
    reader, runs = ListeningReader(), [kept(), kept(), kept()]

    async def study() -> None:
        async with Held(reader) as held, aclosing(held.each(runs)) as finished:
            async for _ in finished:
                if leave == "raise":
                    raise ValueError
                if leave == "cancel":
                    await asyncio.sleep(60)
                break

    task = asyncio.create_task(study())
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert reader.asked == [(0, "steering_forget", [runs[0].key])]
    assert reader.closed == 1
    assert not reader.keeping.locked()


async def test_only_so_many_studies_have_something_kept_at_a_time() -> None:
    reader = ListeningReader(studies=2)
    inside = most = 0

    async def study() -> None:
        nonlocal inside, most
        async with Held(reader) as held:
            inside += 1
            most = max(most, inside)
            try:
                async for _ in held.each([kept(), kept()]):
                    pass
            finally:
                inside -= 1

    waiting = [asyncio.create_task(study()) for _ in range(6)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    waiting[4].cancel()  # while it waits
    await asyncio.gather(*waiting, return_exceptions=True)
    assert most == 2
    assert len(reader.runs) >= 8


async def test_runs_have_salts_of_their_own_where_blocks_may_come_from_elsewhere() -> None:
    runs = [kept(), kept()]
    for external, wanted in ((True, {run.key for run in runs}), (False, {None})):
        reader = ListeningReader(external_blocks=external)
        async with Held(reader) as held:
            async for _ in held.each(runs):
                pass
        assert {run.prompt.get("cache_salt") for run in reader.runs} == wanted


async def test_run_keeps_the_positions_that_are_asked_for() -> None:
    reader = ListeningReader()
    run = KeptRun(Text((1, 2, 3), (4, 5)), None, 2, 2, last_enters=False)
    made = run.run(reader)
    assert made.prompt["prompt_token_ids"] == [1, 2, 3, 4]
    assert made.accepted is not None and made.accepted.keep is not None
    assert (made.accepted.keep.start, made.accepted.keep.stop) == (2, 4)
    assert made.accepted.prompt_len == 3
    assert not made.reports


async def test_calls_go_on_while_texts_run_and_all_are_waited_for_at_the_end() -> None:
    go = asyncio.Event()

    async def call(answer: int, slow: bool) -> int:
        if slow:
            await go.wait()
        return answer

    async with Calls[int]() as calls:
        calls.begin(call(1, slow=True))
        calls.begin(call(2, slow=False))
        assert await calls.answered() == [2]
        asyncio.get_running_loop().call_later(0.01, go.set)
        assert await calls.answered(every=True) == [1]
        assert await calls.answered(every=True) == []


async def test_call_that_fails_is_heard_of_and_the_others_are_cancelled() -> None:
    cancelled = 0

    async def fails() -> int:
        raise ValueError("no answer")

    async def waits() -> int:
        nonlocal cancelled
        try:
            await asyncio.sleep(60)
        finally:
            cancelled += 1
        return 0

    with pytest.raises(ValueError, match="no answer"):
        async with Calls[int]() as calls:
            calls.begin(waits())
            calls.begin(fails())
            while True:
                await calls.answered()
    assert cancelled == 1
