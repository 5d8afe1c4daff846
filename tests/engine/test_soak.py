"""What the soak sees of a server's processes, and what it calls a leak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.engine import processes
from tests.engine.soak_run import Look, grown

IDLE = {"steering_slots_in_use": 0.0, "steering_rows_in_use": 0.0}
MIB = 2**20


def looks(memory: list[int], files: list[int]) -> list[Look]:
    return [
        Look(float(minute), IDLE, {"Worker": mib * MIB}, {"Worker": descriptors})
        for minute, (mib, descriptors) in enumerate(zip(memory, files, strict=True))
    ]


def test_server_that_stays_as_it_was_is_not_called_leaking() -> None:
    assert (
        grown(looks([500, 700, 800, 801, 799, 802, 800, 803], [90, 99, 99, 98, 99, 99, 98, 99]))
        == []
    )


def test_memory_that_grows_to_the_end_is_named() -> None:
    assert grown(looks([500, 550, 600, 650, 700, 750, 800, 850], [90] * 8)) == [
        "Worker: 725 MiB, then 825 MiB"
    ]


def test_descriptors_that_are_never_closed_are_named() -> None:
    found = grown(looks([500] * 8, [90, 100, 110, 120, 130, 140, 150, 160]))
    assert found == ["Worker: 140 open files, then 160"]


def test_slot_that_an_idle_server_holds_is_named() -> None:
    held = Look(1.0, {**IDLE, "steering_slots_in_use": 1.0}, {}, {})
    assert grown([held]) == [f"minute 1.0: {held.usage}"]


def test_run_without_a_look_is_no_success() -> None:
    assert grown([]) == ["the server was never looked at"]


def test_processes_of_a_session_are_seen_with_what_they_hold(tmp_path: Path) -> None:
    code = "import sys; held = open(sys.argv[1], 'w'); print('ready', flush=True); input()"
    words = [sys.executable, "-c", code, str(tmp_path / "held")]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"ready\n"
        (found,) = processes.of_session(started.pid)
        assert found.pid == started.pid
        assert str(tmp_path) in found.name
        assert found.open_files >= 4
        assert found.resident_bytes > 2**20
        started.communicate(b"\n")
    assert (found.open_files, found.resident_bytes) == (0, 0)
    assert os.getpid() not in {process.pid for process in processes.of_session(started.pid)}
