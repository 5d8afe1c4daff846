"""Studies over HTTP as streams, failures inside them, and a client that leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, Final

import pytest
from vllm.exceptions import QueueOverflowError
from vllm.v1.engine.exceptions import EngineDeadError

from server.study_stream import RunningStudy, StudyStream
from steering.errors import BudgetNotMetError, SteeringError
from steering.studies.progress import Progress
from tests.server.conftest import Server, StartServer
from tests.server.counters import value
from tests.server.fakes import FakeEngine

FORECAST = "/v1/steering/forecast"
CONTRAST = "/v1/saes/a/contrast"
EDIT: Final = {"feature": 5, "op": "clamp", "value": 2.0}
STEERING: Final = {"interventions": [EDIT]}
TEXT = {"prompt": "The weather", "completion": " is cold"}
SIDES = {"positive": [TEXT], "negative": [TEXT]}


@pytest.fixture
def server(start: StartServer) -> Server:
    return start(saes={"a": {}})


def events(text: str) -> list[Any]:
    """The data of server-sent events, parsed where it is JSON."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(line) if line.startswith("{") else line for line in lines]


def test_stream_tells_progress_then_the_result_then_the_end(server: Server) -> None:
    body = {"steering": STEERING, "stream": True}
    answer = server.client.post(FORECAST, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *progress, result, end = events(answer.text)
    assert progress
    assert all(event["object"] == "steering.progress" for event in progress)
    assert {*progress[0]} == {"object", "done", "of"}
    assert result == server.client.post(FORECAST, json={"steering": STEERING}).json()
    assert end == "[DONE]"


async def streamed(running: RunningStudy) -> list[Any]:
    assert await running.begun()
    return events("".join([event async for event in running.events()]))


async def test_error_inside_a_stream_is_an_event_with_all_that_an_answer_has() -> None:
    curve = [{"multiplier": 1.0, "kl": 3.0}]

    async def study(progress: Progress) -> dict[str, Any]:
        progress.expect(2)
        await asyncio.sleep(0)
        progress.step()
        await asyncio.sleep(0)
        raise BudgetNotMetError("too strong", "budget", curve)

    before = value("steering_rejected_total", code="budget_not_met")
    *progress, error, end = await streamed(RunningStudy(study))
    assert value("steering_rejected_total", code="budget_not_met") == before + 1
    assert progress[-1] == {"object": "steering.progress", "done": 1, "of": 2}
    assert error["error"] == {
        "message": "too strong",
        "type": "invalid_request_error",
        "param": "budget",
        "code": "budget_not_met",
        "curve": curve,
    }
    assert end == "[DONE]"


async def test_failure_inside_a_stream_says_nothing_of_the_servers_insides() -> None:
    async def study(progress: Progress) -> dict[str, Any]:
        progress.expect(1)
        await asyncio.sleep(0)
        raise RuntimeError("/secret/path")

    *_, error, end = await streamed(RunningStudy(study))
    assert (error["error"]["code"], end) == (500, "[DONE]")
    assert "secret" not in json.dumps(error)


async def test_study_whose_engine_ends_is_told_so_without_a_trace_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def study(progress: Progress) -> dict[str, Any]:
        progress.expect(1)
        await asyncio.sleep(0)
        raise EngineDeadError

    with caplog.at_level("INFO", logger="vllm.sae.server"):
        *_, error, end = await streamed(RunningStudy(study))
    assert (error["error"]["code"], end) == (500, "[DONE]")
    (record,) = (record for record in caplog.records if record.name == "vllm.sae.server")
    assert record.exc_info is None


async def test_study_whose_text_the_engine_refuses_is_told_the_engines_status() -> None:
    async def study(progress: Progress) -> dict[str, Any]:
        progress.expect(1)
        await asyncio.sleep(0)
        raise QueueOverflowError

    *_, error, end = await streamed(RunningStudy(study))
    assert (error["error"]["code"], end) == (503, "[DONE]")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [TypeError, ValueError, RuntimeError])
def test_failure_of_a_study_is_no_fault_of_its_body_and_is_in_the_log(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: type[Exception],
    stream: bool,
) -> None:
    def fail(*_: object) -> None:
        raise failure("/secret/path")

    monkeypatch.setattr("steering.studies.forecast.gain_matrix", fail)
    monkeypatch.setattr(Progress, "expect", lambda *_: None)  # or the stream would have begun
    with caplog.at_level("ERROR", logger="vllm.sae.server"):
        answer = server.client.post(FORECAST, json={"steering": STEERING, "stream": stream})
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "the study failed",
        "type": "Internal Server Error",
        "param": None,
        "code": 500,
    }
    assert "/secret/path" in caplog.text


async def test_refusal_before_anything_runs_is_raised_and_not_streamed() -> None:
    async def study(progress: Progress) -> dict[str, Any]:
        raise SteeringError("invalid_value", "no", "texts")

    with pytest.raises(SteeringError, match="no"):
        await RunningStudy(study).begun()


# A client that leaves


class HeldEngine(FakeEngine):
    """Counts the requests in it, and never answers one."""

    running = 0

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        self.running += 1
        try:
            await asyncio.Event().wait()
            yield None
        finally:
            self.running -= 1


@pytest.mark.parametrize("stream", [False, True])
async def test_study_leaves_the_engine_with_its_client(
    start: StartServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr("tests.server.conftest.FakeEngine", HeldEngine)
    server = await asyncio.to_thread(start)
    engine = server.recorder.engine
    assert isinstance(engine, HeldEngine)
    left = asyncio.Event()
    body = json.dumps({**SIDES, "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": CONTRAST,
        "raw_path": CONTRAST.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "server": ("test", 80),
        "client": ("test", 1),
    }
    app: Any = server.client.app
    serving = asyncio.ensure_future(app(scope, receive, send))
    async with asyncio.timeout(30):
        while engine.running < 2:
            await asyncio.sleep(0.01)
        left.set()
        await serving
    assert engine.running == 0
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


async def test_stream_that_nobody_reads_to_its_end_ends_its_study() -> None:
    ended = asyncio.Event()

    async def study(progress: Progress) -> dict[str, Any]:
        progress.expect(1)
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return {}

    running = RunningStudy(study)
    assert await running.begun()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        """Whatever is sent goes nowhere."""

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    await StudyStream(running)(scope, receive, send)
    assert ended.is_set()
