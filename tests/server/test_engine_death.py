"""An engine that ends by itself, and what a stopped or dead one still ran."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from argparse import Namespace
from typing import Any

import pytest

from server.__main__ import main
from server.commands import serve as serving
from server.start import engine_death


class Engine:
    """Alive until it is stopped or dies."""

    def __init__(self) -> None:
        self.errored = False
        self.stops = 0
        self.fails = False
        self.output_handler: asyncio.Future[Any] | None = None
        self.output_processor = self
        self.request_states = {"one": None, "two": None}
        self.aborted: list[str] = []

    def abort_requests(self, request_ids: list[str], internal: bool) -> None:
        assert internal
        self.aborted += request_ids

    def shutdown(self, timeout: float | None = None) -> None:
        self.errored = True
        self.stops += 1
        if self.fails:
            raise OSError


@pytest.mark.parametrize("died", [False, True])
def test_only_an_engine_that_ends_by_itself_makes_the_server_fail(
    died: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    engine = Engine()

    def run(args: Namespace) -> None:
        engine_death.watch(engine)
        engine.errored = died
        engine.shutdown(timeout=1)
        engine.shutdown()  # when the server cleans up

    monkeypatch.setattr(engine_death, "_seen", threading.Event())
    monkeypatch.setattr(ServeSubcommand, "cmd", run)
    monkeypatch.setattr(serving, "serve", lambda argv: serving._run(Namespace()))
    assert main(["serve", "m"]) == died
    assert ("ended by itself" in capsys.readouterr().err) == died
    assert engine.stops == 2


@pytest.mark.parametrize("fails", [False, True])
async def test_what_a_stopped_engine_still_runs_is_aborted_on_its_own_loop(fails: bool) -> None:
    engine = Engine()
    engine.fails = fails
    engine.output_handler = asyncio.get_running_loop().create_future()
    engine_death.watch(engine)
    with contextlib.suppress(OSError):
        await asyncio.to_thread(engine.shutdown)
    await asyncio.sleep(0)
    assert engine.aborted == ["one", "two"]


async def test_what_a_dead_engine_ran_is_left_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_death, "_seen", threading.Event())
    engine = Engine()
    engine.output_handler = asyncio.get_running_loop().create_future()
    engine_death.watch(engine)
    engine.errored = True
    await asyncio.to_thread(engine.shutdown)
    await asyncio.sleep(0)
    assert engine.aborted == []
