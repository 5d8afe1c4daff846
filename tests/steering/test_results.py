"""Which engine is asked for results, and who waits for the answer."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.executor.multiproc_executor import FutureWrapper, MultiprocExecutor

from steering.report import Summary
from steering.request.plan import PlannedEdit, SteeringPlan
from steering.vllm import results
from steering.vllm.drain import TAKE, Unfetched, stay_for_results
from steering.vllm.results import remember_engines
from steering.worker.pass_reports import PassReports
from steering.worker.record import RequestRecord
from steering.worker.record_store import RecordStore
from steering.worker.worker_state import SteeringState

KEY = "ticket/1"
LIMITS = {0: 7}


def request(awaited: bool = True, req_id: str = "1") -> Any:
    plan = {"key": KEY, "awaited": awaited}
    params = SimpleNamespace(extra_args={"steering_plan": plan})
    return SimpleNamespace(request_id=req_id, sampling_params=params)


class Client(DPLBAsyncMPClient):
    """vLLM's client of several engines, without the engines."""

    def __init__(self, chosen: list[str]) -> None:
        self.core_engines = ["0", "1", "2"]
        self.chosen = chosen
        self.asked: list[str] = []

    async def _call_utility_async(self, method: str, key: str, limits: Any, engine: str) -> Any:
        assert (method, key) == (TAKE, KEY)
        self.asked.append(engine)
        found = engine in ("1", "2")
        return [[Summary(child).to_wire() for child in limits] if found else None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's choice of an engine is the test's; the project's note of it is what is tested."""
    name = "get_core_engine_for_request"
    monkeypatch.setattr(DPLBAsyncMPClient, name, lambda self, request: self.chosen.pop(0))
    remember_engines()


async def fetch(client: Client, limits: dict[int, int] = LIMITS) -> list[Summary]:
    engine = SimpleNamespace(engine_core=client, errored=False)
    return await results._fetch(engine, KEY, limits)


async def test_only_the_engine_that_ran_a_request_is_asked(choose: None) -> None:
    client = Client(["1"])
    assert client.get_core_engine_for_request(request()) == "1"
    assert [summary.child for summary in await fetch(client)] == [0]
    assert client.asked == ["1"]


async def test_children_may_have_run_on_different_engines(choose: None) -> None:
    client = Client(["2", "1"])
    for child in range(2):
        client.get_core_engine_for_request(request(req_id=f"{child}_1"))
    await fetch(client, {0: 7, 1: 7, 2: 7})
    assert sorted(client.asked) == ["1", "2"]


async def test_all_are_asked_if_it_is_not_known_who_ran_it(choose: None) -> None:
    client = Client(["1"])
    client.get_core_engine_for_request(request(awaited=False))
    await fetch(client)
    assert sorted(client.asked) == ["0", "1", "2"]


async def test_all_are_asked_if_the_engine_has_been_taken_away(choose: None) -> None:
    client = Client(["9"])
    client.get_core_engine_for_request(request())
    await fetch(client)
    assert sorted(client.asked) == ["0", "1", "2"]


async def test_engines_are_forgotten_with_the_results(choose: None) -> None:
    client = Client(["1"])
    client.get_core_engine_for_request(request())
    await fetch(client)
    assert client.steering_engines == {}


# The pass under way


class Event:
    """A CUDA event: whether the stream has come to it."""

    def __init__(self, done: bool) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        pytest.fail("waited for the pass under way")


def test_results_do_not_wait_for_the_pass_under_way() -> None:
    edit = PlannedEdit(0, 3, 0, 1.0, 3, 0, 100)
    plan = SteeringPlan(KEY, 1, 2, (edit,), True, True, None, awaited=True)
    store, reports = RecordStore(), PassReports()
    record = store.open("1", lambda: RequestRecord(plan, 0, [0], [("hook", 0)]))
    reports.follow(record)
    for position, done in ((1, True), (2, False)):
        columns = torch.tensor([position]), torch.ones(1, 1), torch.ones(1, 1)
        reports.copy(RequestRecord.put_edits, np.array([record.number]), *columns)
        reports._copies[-1] = replace(reports._copies[-1], copied=Event(done))
    state: Any = SimpleNamespace(reports=reports, records=store)
    (summary,) = SteeringState.take_results(state, KEY, {0: 2})
    assert summary["edits"][0]["tokens_edited"] == 1


# Beside a batch in flight


class Executor(MultiprocExecutor):
    """vLLM's executor of workers in other processes, whose answers the test gives."""

    def __init__(self) -> None:
        self.futures_queue: deque[Any] = deque()
        self.answers: deque[Any] = deque()

    def collective_rpc(self, method: str, args: Any = (), non_block: bool = False) -> Any:
        future = FutureWrapper(self.futures_queue, self.answers.popleft)
        return future if non_block else future.result()


class Core(EngineCoreProc):
    """vLLM's engine core, with nothing to run."""

    def __init__(self) -> None:
        self.model_executor = Executor()
        self.batch_queue: Any = deque()
        self.engines_running = False
        self.scheduler = SimpleNamespace(unfetched=Unfetched(), has_requests=lambda: False)
        self.scheduler.unfetched.add(KEY)
        self.vllm_config = SimpleNamespace(shutdown_timeout=0)

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.model_executor.collective_rpc(method, *args, **kwargs)

    def is_running(self) -> bool:
        return True


@pytest.fixture
def core() -> Core:
    stay_for_results()
    return Core()


def take(core: Core) -> Any:
    return getattr(core, TAKE)(KEY, LIMITS)


def test_results_are_fetched_at_once_while_nothing_is_in_flight(core: Core) -> None:
    core.model_executor.answers.append(["summaries"])
    assert take(core) == ["summaries"]
    assert not core.scheduler.unfetched
    core.batch_queue = None  # as without asynchronous scheduling
    core.model_executor.answers.append(["more"])
    assert take(core) == ["more"]


def test_fetch_beside_a_batch_does_not_wait_and_a_later_batch_brings_it(core: Core) -> None:
    executor = core.model_executor
    first = executor.collective_rpc("execute_model", non_block=True)
    core.batch_queue.append(first)
    taken = take(core)
    assert not taken.done()
    assert core.scheduler.unfetched
    second = executor.collective_rpc("execute_model", non_block=True)
    executor.answers.extend(["first batch", ["summaries"], "second batch"])
    assert first.result() == "first batch"
    assert not taken.done()
    assert second.result() == "second batch"
    assert taken.done() and taken.result() == ["summaries"]
    assert not core.scheduler.unfetched


def test_fetch_is_completed_if_no_later_batch_comes(core: Core) -> None:
    executor = core.model_executor
    core.batch_queue.append(executor.collective_rpc("execute_model", non_block=True))
    taken = take(core)
    told: list[Any] = []
    taken.add_done_callback(lambda future: told.append(future.result()))
    executor.answers.extend(["batch", ["summaries"]])
    assert core.has_work()
    assert told == []
    core.batch_queue.pop().result()
    assert not core.has_work()
    assert told == [["summaries"]]


def test_fetch_that_fails_is_told_and_ends_nothing(core: Core) -> None:
    core.batch_queue.append("a batch")
    taken = take(core)
    core.batch_queue.clear()  # and no answer comes: the executor raises
    assert not core.has_work()
    with pytest.raises(IndexError):
        taken.result()
