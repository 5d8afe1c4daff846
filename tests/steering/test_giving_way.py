"""Studies beside served requests: one turn at a time, and a rest after each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from steering.vllm import giving_way
from steering.vllm.giving_way import GivingWay

#: Far more than a turn that is free needs, and what a turn that is not is watched for.
TIMEOUT = 10
WATCHED = 0.1


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Server:
    """An engine that has so many served requests, and those of studies that are in a turn."""

    def __init__(self, tokens: int = 100, share: float = 0.1) -> None:
        self.served = 0
        self.of_studies = 0
        self.order: list[str] = []
        self.way = GivingWay(lambda: self.served + self.of_studies, tokens, share)

    async def run(self, name: str, until: asyncio.Event, tokens: int = 10) -> None:
        async with self.way.request(tokens):
            self.of_studies += 1
            self.order.append(name)
            try:
                await until.wait()
            finally:
                self.of_studies -= 1

    async def call(self, name: str, until: asyncio.Event) -> None:
        async with self.way.call():
            self.order.append(name)
            await until.wait()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(giving_way, "time", clock)
    return clock


async def reached(said: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not said():
            await asyncio.sleep(0.001)


def task(*runs: object) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(run) for run in runs]  # type: ignore[arg-type]


async def ended(tasks: list[asyncio.Task[None]]) -> None:
    async with asyncio.timeout(TIMEOUT):
        await asyncio.gather(*tasks)


async def test_on_an_idle_server_runs_share_the_engine_up_to_a_steps_tokens(clock: Clock) -> None:
    server, go = Server(tokens=100), asyncio.Event()
    tasks = task(*(server.run(str(i), go, tokens=40) for i in range(3)))
    await asyncio.sleep(WATCHED)
    assert server.order == ["0", "1"]
    go.set()
    await ended(tasks)
    assert server.order == ["0", "1", "2"]


async def test_run_of_more_tokens_than_a_step_has_the_engine_for_itself(clock: Clock) -> None:
    server, go = Server(tokens=100), asyncio.Event()
    tasks = task(server.run("long", go, tokens=1000), server.run("short", go, tokens=1))
    await asyncio.sleep(WATCHED)
    assert server.order == ["long"]
    go.set()
    await ended(tasks)


async def test_beside_a_served_request_one_run_or_call_has_its_turn_at_a_time(
    clock: Clock,
) -> None:
    server, first, second = Server(share=1.0), asyncio.Event(), asyncio.Event()
    server.served = 1
    tasks = task(server.run("run", first), server.call("call", second))
    await asyncio.sleep(WATCHED)
    assert server.order == ["run"]
    first.set()
    await reached(lambda: server.order == ["run", "call"])
    tasks += task(server.run("after", first))
    await asyncio.sleep(WATCHED)
    assert server.order == ["run", "call"]
    second.set()
    await ended(tasks)


async def test_after_a_turn_beside_a_served_request_studies_rest_for_the_others_share(
    clock: Clock,
) -> None:
    server, go = Server(share=0.1), asyncio.Event()
    server.served = 1
    tasks = task(server.run("first", go))
    await reached(lambda: server.order == ["first"])
    clock.now += 2.0
    go.set()
    await ended(tasks)
    tasks = task(server.run("second", go))
    clock.now += 17.9  # of 18 seconds
    await asyncio.sleep(WATCHED)
    assert server.order == ["first"]
    clock.now += 0.2
    await ended(tasks)


async def test_turn_that_a_served_request_came_into_counts_and_its_end_ends_the_rest(
    clock: Clock,
) -> None:
    server, go = Server(), asyncio.Event()
    tasks = task(server.run("first", go))
    await reached(lambda: server.order == ["first"])
    server.served = 1
    clock.now += 1.0
    go.set()
    await ended(tasks)
    tasks = task(server.run("second", go))
    await asyncio.sleep(WATCHED)
    assert server.order == ["first"]
    server.served = 0
    await ended(tasks)


async def test_runs_of_studies_are_no_served_requests(clock: Clock) -> None:
    server, go = Server(tokens=100, share=0.1), asyncio.Event()
    tasks = task(server.run("first", go), server.run("second", go))
    await reached(lambda: server.order == ["first", "second"])
    clock.now += 5.0
    go.set()
    await ended(tasks)
    await ended(task(server.run("third", go)))


async def test_studies_have_their_turns_in_the_order_in_which_they_ask(clock: Clock) -> None:
    server, go = Server(share=1.0), asyncio.Event()
    server.served = 1
    names = [str(i) for i in range(6)]
    tasks = task(*(server.run(name, go) for name in names))
    go.set()
    await ended(tasks)
    assert server.order == names


async def test_one_that_leaves_while_it_waits_or_runs_leaves_its_turn_to_the_next(
    clock: Clock,
) -> None:
    server, go = Server(share=1.0), asyncio.Event()
    server.served = 1
    running, waiting, next_one = task(
        server.run("running", go), server.run("waiting", go), server.run("next", go)
    )
    await reached(lambda: server.order == ["running"])
    waiting.cancel()
    running.cancel()
    await reached(lambda: server.order == ["running", "next"])
    go.set()
    await ended([next_one])
