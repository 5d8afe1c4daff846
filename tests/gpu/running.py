"""One part of `make gpu`: its process, its time, and what it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final
from xml.etree import ElementTree

from tests.gpu.device import REHEARSAL_VARIABLE
from tests.gpu.parts import INTERPRETED, Part

ROOT: Final = Path(__file__).parents[2]
PASSED, FAILED, ENDED, LEFT_OUT = "passed", "failed", "ended for time", "left out"
#: Lines of its log that a part which fails leaves in the result.
LOG_LINES: Final = 60
ALL_LOG_LINES: Final = 400
#: Seconds between a polite end and a hard one.
PATIENCE: Final = 20


def run(part: Part, folder: Path, rehearsal: bool) -> dict[str, Any]:
    """Run a part in a session of its own; whatever happens in it is in what is returned."""
    result, log = folder / f"{part.name}{part.suffix}", folder / f"{part.name}.log"
    command = part.command(str(result), rehearsal)
    result.unlink(missing_ok=True)  # of another run, which this one must not be taken for
    started = time.monotonic()
    with log.open("wb") as file:
        process = begin(command, file, environment(part, os.environ, rehearsal))
        try:
            code: int | None = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    status = ENDED if code is None else FAILED if code else PASSED
    found: dict[str, Any] = {
        "name": part.name,
        "about": part.about,
        "status": status,
        "exit": code,
        "seconds": round(time.monotonic() - started, 1),
        "command": " ".join(command[1:]),
        "log": log.name,
    }
    with suppress(OSError, ValueError, ElementTree.ParseError):
        text = result.read_text()
        found["result"] = tests_of(text) if part.module is None else json.loads(text)
    if part.module is None and status == PASSED and not _ran(found):
        found["status"] = FAILED  # a selection that selects nothing shows nothing
    if found["status"] != PASSED:
        # Without a result the log is all that says how far it came.
        found["log_end"] = last_lines(log, LOG_LINES if "result" in found else ALL_LOG_LINES)
    return found


def left_out(part: Part, why: str) -> dict[str, Any]:
    """The entry of a part that is not run."""
    return {"name": part.name, "about": part.about, "status": LEFT_OUT, "why": why}


def environment(part: Part, given: Mapping[str, str], rehearsal: bool) -> dict[str, str]:
    """What a part's process sees."""
    made = {**given, "PYTHONPATH": str(ROOT)}
    made.pop("TRITON_INTERPRET", None)
    if rehearsal:
        made |= {REHEARSAL_VARIABLE: "1", **(INTERPRETED if part.interpreted else {})}
    return made


def tests_of(junit: str) -> dict[str, Any]:
    """Pytest's JUnit text: how many did what, what failed, and the figures that tests noted."""
    cases = [*ElementTree.fromstring(junit).iter("testcase")]
    failed, skipped, figures = [], [], []
    for case in cases:
        name = case.get("name", "")
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                failed.append({"test": name, "message": found.get("message", "")[:2000]})
        if (found := case.find("skipped")) is not None:
            skipped.append({"test": name, "message": found.get("message", "")[:300]})
        figures += [
            {"test": name, "figure": one.get("name"), "value": float(one.get("value", "nan"))}
            for one in case.iter("property")
        ]
    bad = {one["test"] for one in failed}
    return {
        "tests": len(cases),
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": failed,
        "skipped": skipped,
        "figures": figures,
    }


def last_lines(log: Path, count: int = LOG_LINES) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def _ran(found: Mapping[str, Any]) -> bool:
    return bool(found.get("result", {}).get("passed"))


def begin(
    command: Sequence[str], log: BinaryIO, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Begin a command in a session of its own, from the main thread, so that `end` can end it.

    A shell has what it runs in the background ignore SIGINT, and processes inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the session, engines of a part that was ended included.

    The part itself is interrupted first, as by a person: pytest and the benchmarks then write down
    what they know.
    """
    with suppress(subprocess.TimeoutExpired):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
