"""`make gpu`, as far as a machine without a GPU can have it: the command itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch

from steering.vllm import runner_v2
from tests.gpu import battery, page, running, watch
from tests.gpu.parts import PARTS, Part, chosen
from tests.gpu.running import ENDED, FAILED, LEFT_OUT, PASSED, end, left_out, run

ROOT: Final = Path(__file__).parents[1]
QUICK: Final = "tests/test_imports.py"


def command(*words: str, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so_and_nothing_is_run(tmp_path: Path) -> None:
    done = command("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("no CUDA device") and "make gpu CUDA=1" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_rehearsal_leaves_one_json_one_page_and_clear_last_lines(tmp_path: Path) -> None:
    done = command(
        *("--device", "cpu", "--out", str(tmp_path)),
        *("--only", "engine-eager", "kernel-times"),
        seconds=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, passed, send = done.stdout.splitlines()
    assert passed == "passed: engine-eager, kernel-times"
    assert send == f"send back: {tmp_path / 'gpu.json'} and {tmp_path / 'gpu.md'}"
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["rehearsal"]
    engine, kernels = found["parts"]
    assert engine["result"]["failed"] == []
    assert engine["result"]["passed"] > 30
    nats = [one for one in engine["result"]["figures"] if one["figure"] == "nats from unsteered"]
    assert max(one["value"] for one in nats) > 1.0
    rows = kernels["result"]["results"]
    assert {row["kernel"] for row in rows} == {"edit", "gates", "reads", "writes"}
    assert all(row["measured_us"] > 0 and row["predicted_us"] > 0 for row in rows)
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# A rehearsal on a CPU")
    for word in ("nats from the reference", "predicted us", engine["command"]):
        assert word in text


@pytest.mark.parametrize(
    ("part", "status"),
    [
        (Part("good", "", tests=(QUICK,)), PASSED),
        (Part("hangs", "", tests=(QUICK,), seconds=0), ENDED),
        (Part("lacks", "", module="tests.bench.of_no_name"), FAILED),
        (Part("selects nothing", "", tests=(QUICK, "-k", "no_test_has_this_name")), FAILED),
    ],
    ids=lambda value: value.name if isinstance(value, Part) else "",
)
def test_what_becomes_of_a_part_is_told_with_the_end_of_its_log(
    tmp_path: Path, part: Part, status: str
) -> None:
    stale = tmp_path / f"{part.name}{part.suffix}"
    stale.write_text('{"results": []}')
    found = run(part, tmp_path, rehearsal=True)
    assert found["status"] == status
    assert ("log_end" in found) == (status != PASSED)
    if part.name == "lacks":
        assert "No module named tests.bench.of_no_name" in found["log_end"]
        assert "result" not in found and not stale.exists()
    if part.name == "good":
        assert found["result"]["passed"] == found["result"]["tests"] > 0


@pytest.mark.parametrize("ignored", [False, True], ids=["", "in the background of a shell"])
def test_a_part_that_is_ended_leaves_the_results_of_what_it_finished(
    tmp_path: Path, ignored: bool
) -> None:
    tests, reached = tmp_path / "test_two.py", tmp_path / "reached"
    tests.write_text(
        "import pathlib, time\n"
        "def test_done(): pass\n"
        f"def test_hangs(): pathlib.Path({str(reached)!r}).touch(); time.sleep(600)\n"
    )
    result = tmp_path / "two.xml"
    part = Part("two", "", tests=(str(tests), "--rootdir", str(tmp_path), "-c", os.devnull))
    before = signal.getsignal(signal.SIGINT)
    with (tmp_path / "two.log").open("wb") as log:
        try:
            if ignored:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            process = running.begin(part.command(str(result), rehearsal=True), log, os.environ)
        finally:
            signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 120
        while not reached.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert reached.exists(), (tmp_path / "two.log").read_text()
    finally:
        end(process)
    found = running.tests_of(result.read_text())
    assert found["passed"] >= 1 and process.poll() is not None


def test_passes_are_counted_by_what_they_need_and_the_graph_they_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dispatch(mode: str) -> Any:
        return SimpleNamespace(cg_mode=SimpleNamespace(name=mode)), None

    counted = watch.counting(dispatch)
    for mode, whole in (("FULL", False), ("PIECEWISE", True), ("FULL", False)):
        monkeypatch.setattr(runner_v2._full_pass, "needed", lambda whole=whole: whole)
        assert counted(mode) == dispatch(mode)
    taken = watch.GraphWatch().graphs_taken()
    assert taken == {watch.ROWS: {"FULL": 2}, watch.WHOLE: {"PIECEWISE": 1}}
    assert watch.GraphWatch().graphs_taken() == {watch.ROWS: {}, watch.WHOLE: {}}


def test_every_request_of_the_battery_is_in_a_wave_and_known() -> None:
    assert {*battery.ROWS, *battery.WHOLE} <= set(battery.WAVES["everything"])
    assert all(name in battery.EVERY for names in battery.WAVES.values() for name in names)


def test_graphs_are_captured_for_any_batch_of_the_batterys_prompts_and_decodes() -> None:
    assert battery.AT_ONCE * max(battery.LENGTHS) <= max(battery.CAPTURED)
    assert battery.AT_ONCE in battery.CAPTURED


def test_every_part_names_something_that_exists() -> None:
    for part in PARTS:
        assert (part.module is None) != (not part.tests), part.name
        if part.module is not None:
            assert find_spec(part.module) is not None
        else:
            assert (ROOT / part.tests[0]).exists()
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_parts_that_need_more_gpus_are_left_out_and_say_why() -> None:
    left = [(part.name, why) for part, why in chosen(None, False, 1) if why is not None]
    assert left == [("engine-two-ranks", "2 GPUs are needed, and here is 1")]
    assert all(why is None for _, why in chosen(None, False, 2))


def test_the_page_tells_failures_figures_targets_and_what_was_left_out() -> None:
    failing = {
        "name": "broken", "about": "What breaks.", "status": FAILED, "exit": 1, "seconds": 3.0,
        "command": "-m pytest", "log": "broken.log", "log_end": "the last line",
        "result": {
            "tests": 3, "passed": 1,
            "failed": [{"test": "test_a", "message": "assert 1\n == 2"}],
            "skipped": [{"test": "test_b", "message": "no need"}],
            "figures": [{"test": "test_c", "figure": "nats", "value": v} for v in (0.5, 0.25)],
        },
    }  # fmt: skip
    value: dict[str, Any] = {"median": 0.9, "low": 0.8, "high": 1.0, "values": [0.9]}
    bench = {
        "name": "times", "about": "Times.", "status": PASSED, "exit": 0, "seconds": 1.0,
        "command": "-m tests.bench.x", "log": "times.log",
        "result": {
            "about": "A table.", "results": [{"case": "a", "ratio": value}],
            "targets": [{"what": "ratio", "value": value, "bound": 0.95, "at_most": False}],
        },
    }  # fmt: skip
    found: dict[str, Any] = {
        "rehearsal": False,
        "begun": "now",
        "commit": None,
        "machine": {"processor": "x", "cores": 2, "torch": "2", "gpus": []},
        "parts": [failing, bench, left_out(PARTS[0], "no room")],
    }
    assert page.last_lines(found) == [
        "passed: times",
        "FAILED: broken (failed)",
        f"{LEFT_OUT}: {PARTS[0].name} (no room)",
    ]
    text = page.page(found)
    for said in ("assert 1 == 2", "1 skipped: no need", "5.00e-01", "the last line", "missed",
                 "1 of 3 tests passed, 1 skipped, 1 FAILED", "0.900 (0.800 to 1.000)"):  # fmt: skip
        assert said in text, said
