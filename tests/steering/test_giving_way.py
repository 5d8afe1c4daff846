"""Studies beside served requests: one turn at a time, and a rest after each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

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
        self.errored = False
        self.way = GivingWay(
            lambda: self.served + self.of_studies,
            tokens,
            share,
            admits=lambda: self.served + self.of_studies < self.limit,
            errored=lambda: self.errored,
        )
        self.limit = 1000

    async def run(
        self,
        name: str,
        until: asyncio.Event,
        tokens: int = 10,
        *,
        waited: float = 0.0,
        report: asyncio.Event | None = None,
    ) -> None:
        async with self.way.request(tokens) as turn:
            self.of_studies += 1
            self.order.append(name)
            try:
                await until.wait()
            finally:
                self.of_studies -= 1
            turn.left_engine(waited)
            if report is not None:
                await report.wait()

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


async def first_run(server: Server, go: asyncio.Event, clock: Clock, seconds: float) -> None:
    """A run that takes so long; from then on all runs end at once."""
    tasks = task(server.run("first", go))
    await reached(lambda: server.order == ["first"])
    clock.now += seconds
    go.set()
    await ended(tasks)


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
    await first_run(server, go, clock, 2.0)
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


async def test_what_a_run_waited_for_its_first_step_earns_no_rest(clock: Clock) -> None:
    server, go = Server(share=0.1), asyncio.Event()
    server.served = 1
    tasks = task(server.run("first", go, waited=60.0))
    await reached(lambda: server.order == ["first"])
    clock.now += 61.0
    go.set()
    await ended(tasks)
    clock.now += 9.1  # nine times the second that it did not wait
    await ended(task(server.run("second", go)))


async def test_turn_of_an_engine_that_was_paused_does_not_stop_studies_for_long(
    clock: Clock,
) -> None:
    server, go = Server(share=0.1), asyncio.Event()
    server.served = 1
    await first_run(server, go, clock, 3600.0)
    clock.now += 9 * giving_way.MOST_COUNTED + 0.1
    await ended(task(server.run("second", go)))


async def test_run_whose_report_is_still_fetched_hides_no_served_request(clock: Clock) -> None:
    server, go, report = Server(share=1.0), asyncio.Event(), asyncio.Event()
    go.set()
    tasks = task(server.run("first", go, report=report))
    await reached(lambda: server.order == ["first"] and not server.of_studies)
    server.served = 1
    tasks += task(server.run("second", go))
    await asyncio.sleep(WATCHED)
    assert server.order == ["first"]
    report.set()
    await ended(tasks)


async def test_run_that_the_engine_would_refuse_waits_until_there_is_room(clock: Clock) -> None:
    server, go = Server(share=1.0), asyncio.Event()
    server.limit, server.served = 3, 3
    go.set()
    tasks = task(server.run("run", go), server.call("call", go))
    await asyncio.sleep(WATCHED)
    assert server.order == []
    server.served = 2
    await ended(tasks)
    assert server.order == ["run", "call"]


async def test_nobody_waits_for_an_engine_that_has_ended(clock: Clock) -> None:
    server, go = Server(share=0.1), asyncio.Event()
    server.served = 1
    tasks = task(server.run("first", go))
    await reached(lambda: server.order == ["first"])
    clock.now += 2.0
    tasks += task(server.run("second", go), server.call("third", go))
    server.errored = True
    await reached(lambda: server.order == ["first", "second", "third"])
    go.set()
    await ended(tasks)


def engine_of(
    scheduler: SimpleNamespace, *, engines: int = 1, unfinished: int = 0, queued: int = 0
) -> SimpleNamespace:
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            scheduler_config=scheduler, device_config=SimpleNamespace(device_type="cpu")
        ),
        engine_core=SimpleNamespace(core_engines=list(range(engines))),
        errored=False,
        get_num_unfinished_requests=lambda: unfinished,
        get_num_queued_tokens=lambda: queued,
    )


@pytest.mark.parametrize(("engines", "in_turn"), [(1, ["0"]), (3, ["0", "1", "2"])])
async def test_each_engine_may_have_a_steps_tokens(engines: int, in_turn: list[str]) -> None:
    scheduler = SimpleNamespace(
        max_num_batched_tokens=256, max_num_queued_reqs=None, max_num_queued_tokens=None
    )
    server, go = Server(), asyncio.Event()
    server.way = giving_way.giving_way(engine_of(scheduler, engines=engines))
    tasks = task(*(server.run(str(i), go, tokens=250) for i in range(4)))
    await asyncio.sleep(WATCHED)
    assert server.order == in_turn
    go.set()
    await ended(tasks)


@pytest.mark.parametrize(
    ("requests", "tokens", "unfinished", "queued", "admitted"),
    [
        (None, None, 1000, 10**6, True),
        (8, None, 6, 0, True),
        (8, None, 7, 0, False),  # the last place is a served request's
        (1, None, 0, 0, True),
        (0, None, 0, 0, True),  # the engine itself refuses it, rather than the study wait for ever
        (None, 100, 3, 99, True),
        (None, 100, 3, 100, False),
    ],
)
async def test_studies_leave_the_last_of_the_engines_places_to_served_requests(
    requests: int | None, tokens: int | None, unfinished: int, queued: int, admitted: bool
) -> None:
    scheduler = SimpleNamespace(
        max_num_batched_tokens=512, max_num_queued_reqs=requests, max_num_queued_tokens=tokens
    )
    engine = engine_of(scheduler, unfinished=unfinished, queued=queued)
    way = giving_way.giving_way(engine, share=1.0)
    try:
        async with asyncio.timeout(WATCHED), way.request(10):
            assert admitted
    except TimeoutError:
        assert not admitted


@pytest.mark.parametrize(
    ("stats", "waited"),
    [
        (None, 0.0),
        (SimpleNamespace(queued_ts=7.0, scheduled_ts=9.5), 2.5),
        (SimpleNamespace(queued_ts=7.0, scheduled_ts=0.0), 0.0),  # it never ran
        (SimpleNamespace(queued_ts=0.0, scheduled_ts=9.5), 0.0),
    ],
)
def test_time_in_the_queue_is_what_the_engine_tells(stats: object, waited: float) -> None:
    assert giving_way.seconds_queued(SimpleNamespace(metrics=stats)) == waited
