"""Speculative decoding computes tokens that are rejected, and several positions in one pass.

The engine runs in a child process: vLLM's n-gram proposer imports numba, after which no other
engine starts in the same process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.engine.engine import Engine
from tests.engine.outputs import GENERATION_ONLY, OTHER, reporting, tokens
from tests.engine.speculative import SPECULATIVE

CHILD: Final = "STEERING_TEST_SPECULATIVE_CHILD"
GENERATED: Final = 80

pytestmark = pytest.mark.timeout(900)


def test_speculative_tokens_have_the_right_phase_and_rejected_ones_are_not_counted(
    make_engine: Callable[..., Engine],
) -> None:
    if os.environ.get(CHILD) != "1":
        run_in_a_child()
        return
    plain = make_engine()
    speculating = make_engine(speculative_config=SPECULATIVE)
    # Repeats of what was said before are what n-gram speculation proposes.
    prompts = [tokens(15, 4) + 6 * tokens(16 + i, 5) for i in range(8)]
    fields = [{**reporting(GENERATION_ONLY), "read": {"top_k": 1}}, reporting(OTHER)] * 4
    expected = plain.generate(prompts, fields, max_tokens=GENERATED)
    drafted = count_drafted(speculating)
    made = speculating.generate(prompts, fields, max_tokens=GENERATED)
    turns, proposed = drafted()
    accepted = len(prompts) * GENERATED - turns
    assert 0 < accepted < proposed
    for left, right in zip(made, expected, strict=True):
        assert left.tokens == right.tokens
        assert left.steering is not None
        assert right.steering is not None
        ours, theirs = left.steering[0].interventions[0], right.steering[0].interventions[0]
        assert ours["tokens_edited"] == theirs["tokens_edited"]
        assert ours["mean_activation"] == pytest.approx(theirs["mean_activation"], rel=1e-3)
    assert made[0].steering is not None
    assert expected[0].steering is not None
    mine, reference = made[0].steering[0].read, expected[0].steering[0].read
    assert mine is not None
    assert reference is not None
    assert [t["position"] for t in mine["tokens"]] == [t["position"] for t in reference["tokens"]]


def count_drafted(engine: Engine) -> Callable[[], tuple[int, int]]:
    """Counts requests' turns in passes, and the tokens proposed to them, from now on."""
    turns: list[int] = []
    seen: list[int] = []
    schedule = engine.scheduler.schedule

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        turns.append(len(output.num_scheduled_tokens))
        seen.append(sum(map(len, output.scheduled_spec_decode_tokens.values())))
        return output

    engine.scheduler.schedule = counting
    return lambda: (sum(turns), sum(seen))


def run_in_a_child() -> None:
    """The same test in a process of its own, whose outcome is this one's."""
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, CHILD: "1"},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert finished.returncode == 0, finished.stdout[-6000:]
    assert "1 passed" in finished.stdout, finished.stdout[-2000:]
