"""Which results an engine that was told to stop still waits for."""

from __future__ import annotations

import pytest

from steering.vllm.drain import PATIENCE, Unfetched


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds; a test changes it."""
    now = [100.0]
    monkeypatch.setattr("steering.vllm.drain.time.monotonic", lambda: now[0])
    return now


def test_results_are_waited_for_until_they_are_fetched(clock: list[float]) -> None:
    unfetched = Unfetched()
    assert not unfetched
    unfetched.add("a")
    unfetched.add("b")
    unfetched.discard("a")
    assert unfetched
    unfetched.discard("b")
    unfetched.discard("never there")
    assert not unfetched


def test_results_that_nobody_fetches_are_not_waited_for_any_longer(clock: list[float]) -> None:
    unfetched = Unfetched()
    unfetched.add("a")
    clock[0] += PATIENCE - 1
    unfetched.add("b")
    clock[0] += 2
    assert unfetched
    assert list(unfetched._until) == ["b"]
    clock[0] += PATIENCE
    assert not unfetched
    assert list(unfetched._until) == []


def test_a_later_child_prolongs_the_wait_for_its_request(clock: list[float]) -> None:
    unfetched = Unfetched()
    unfetched.add("a")
    unfetched.add("b")
    clock[0] += PATIENCE - 1
    unfetched.add("a")
    clock[0] += 2
    assert unfetched
    assert list(unfetched._until) == ["a"]
