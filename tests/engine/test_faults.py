"""What goes wrong around a server: files vanish or shrink, a worker dies, disks fill, clocks jump.

It refuses or it ends, and says why; no answer is ever another one.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.engine import processes, traffic
from tests.engine.processes import Process
from tests.engine.server import MODEL, LiveServer, start, wait_until_ready
from tests.engine.traffic import Answer, Case
from tests.models import make_tiny_sae

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FLAGS: Final = (
    *("--max-model-len", "256", "--max-num-seqs", "16", "--no-steering-self-check"),
    "--disable-uvicorn-access-log",
)
WEIGHTS: Final = "sae_weights.safetensors"
#: SAEs of equal weights: one's file stays, the others' are tampered with.
TWINS: Final = ("kept", "deleted", "truncated", "overwritten")
PROMPT: Final = [40, 41, 42, 43, 44, 45]
#: Where Debian's package libfaketime puts what makes a process's clock jump.
FAKETIME: Final = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu" / "faketime"
#: Seconds in which a server whose engine died must have ended.
END_TIMEOUT: Final = 60.0


@dataclass(frozen=True)
class World:
    """A model, its SAEs, and requests whose answers are known."""

    folder: Path
    model: Path
    saes: dict[str, Path]
    cases: list[Case]

    def weights(self, sae: str) -> Path:
        return self.saes[sae] / WEIGHTS


@dataclass(frozen=True)
class Running:
    """The server that the faults befall."""

    server: LiveServer
    world: World

    def assert_answers_are_right(self) -> None:
        cases = self.world.cases
        answers = asyncio.run(traffic.send_all(self.server, cases, at_once=8))
        assert not traffic.wrong(cases, answers)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("faults")
    model, saes = traffic.make_model(folder), traffic.make_saes(folder)
    for name in TWINS:
        saes[name] = make_tiny_sae(
            folder / name, d_sae=traffic.D_SAE, architecture="standard", seed=9, layer=2
        )
    server = start(model, saes, folder / "server.log", *FLAGS)
    try:
        wait_until_ready(server)
        cases = traffic.take_alone(server, traffic.make_bodies(7, 24))
        yield Running(server, World(folder, model, saes, cases))
    finally:
        server.stop()


def steered_by(server: LiveServer, sae: str, feature: int) -> httpx.Response:
    edit = {"sae": sae, "feature": feature, "op": "clamp", "value": 3}
    body = {**traffic.PLAIN, "prompt": PROMPT, "max_tokens": 12}
    steering = {"interventions": [edit], "report": True}
    return server.client.post("/v1/completions", json={**body, "steering": steering})


def tokens_of(response: httpx.Response) -> list[int]:
    assert response.status_code == httpx.codes.OK, response.text
    found: list[int] = response.json()["choices"][0]["token_ids"]
    return found


# Files of an SAE. Every feature asked for is new to the server: its rows are still to be read.


def test_sae_deleted_after_the_start_is_served_as_it_was(running: Running) -> None:
    server = running.server
    shutil.rmtree(running.world.saes["deleted"])
    expected = [tokens_of(steered_by(server, "kept", feature)) for feature in (1, 2)]
    assert [tokens_of(steered_by(server, "deleted", f)) for f in (1, 2)] == expected
    details = server.client.get("/v1/saes/deleted/features/3")
    assert details.status_code == httpx.codes.OK, details.text
    running.assert_answers_are_right()


@pytest.mark.parametrize("sae", ["truncated", "overwritten"])
def test_sae_whose_file_is_written_to_is_refused_and_others_are_served(
    running: Running, sae: str
) -> None:
    server, weights = running.server, running.world.weights(sae)
    before = steered_by(server, sae, 10)
    assert tokens_of(before) == tokens_of(steered_by(server, "kept", 10))
    if sae == "truncated":
        os.truncate(weights, 4096)
    else:
        weights.write_bytes(running.world.weights("relu").read_bytes())
    for feature in (10, 11):
        error = steered_by(server, sae, feature)
        assert error.status_code == httpx.codes.BAD_REQUEST, error.text
        assert error.json()["error"]["code"] == "invalid_weights"
        assert f"SAE {sae!r} changed on disk" in error.json()["error"]["message"]
    for response in (
        server.client.get(f"/v1/saes/{sae}/features/11"),
        server.client.post(f"/v1/saes/{sae}/inspect", json={"prompt": "the lazy dog"}),
    ):
        assert response.status_code == httpx.codes.BAD_REQUEST, response.text
    running.assert_answers_are_right()


# A worker that dies, and the server after it


def test_server_whose_worker_is_killed_ends_and_gives_no_wrong_answer(running: Running) -> None:
    server, cases = running.server, running.world.cases
    assert server.client.get("/health").is_success

    async def answers_while_it_dies() -> list[Answer]:
        asking = asyncio.ensure_future(traffic.send_all(server, cases * 40, at_once=64))
        await asyncio.sleep(1.0)
        os.kill(worker(server).pid, signal.SIGKILL)
        return await asking

    answers = asyncio.run(answers_while_it_dies())
    assert not wrong_successes(cases * 40, answers)
    assert any(answer.status != httpx.codes.OK for answer in answers), "killed too late"
    assert server.process.wait(END_TIMEOUT) == 1
    assert "EngineDeadError" in server.log.read_text()
    with pytest.raises(httpx.TransportError):
        server.client.get("/health")


def worker(server: LiveServer) -> Process:
    """The process that runs the model: the engine core's last, or the engine core itself."""
    return [p for p in processes.of_session(server.process.pid) if "VLLM::" in p.name][-1]


def wrong_successes(cases: list[Case], answers: list[Answer]) -> list[str]:
    """Those of the wrong answers that claim to be whole."""
    pairs = [(c, a) for c, a in zip(cases, answers, strict=True) if a.status == httpx.codes.OK]
    return traffic.wrong([case for case, _ in pairs], [answer for _, answer in pairs])


@dataclass(frozen=True)
class Hardship:
    """What the restarted server lives with: no room for its caches, a clock that is moved."""

    environment: dict[str, str]
    clock: Path | None


@pytest.fixture
def hardship(tmp_path: Path) -> Iterator[Hardship]:
    full = tmp_path / "full"
    full.mkdir()
    mounted = mount_full(full)
    try:
        caches = {name: str(full / name.lower()) for name in CACHES}
        clock = tmp_path / "clock"
        clock.write_text("+0d\n")
        library = FAKETIME / "libfaketimeMT.so.1"
        faked = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            # As when an operator sets the time: what counts seconds since the boot is left alone.
            "DONT_FAKE_MONOTONIC": "1",
        }
        has_library = library.is_file()
        yield Hardship({**caches, **(faked if has_library else {})}, clock if has_library else None)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", full], check=True)


CACHES: Final = (
    *("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "XDG_CACHE_HOME", "HF_HOME"),
    *("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"),
)


def mount_full(folder: Path) -> bool:
    """Make `folder` a file system without room; without the right to, a folder that cannot grow."""
    words = ["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=8", "none", str(folder)]
    mounted = subprocess.run(words, capture_output=True).returncode == 0
    if mounted:
        (folder / "filler").write_bytes(b"x" * 4096)
    else:
        folder.chmod(0o500)
    return mounted


def test_restarted_server_is_right_without_caches_and_while_the_clock_jumps_and_ends_at_once(
    running: Running,
    hardship: Hardship,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, value in hardship.environment.items():
        monkeypatch.setenv(name, value)
    world = running.world
    saes = {name: world.saes[name] for name in ("relu", "topk", "later")}
    server = start(world.model, saes, tmp_path / "restarted.log", *FLAGS)
    try:
        wait_until_ready(server)
        asking = Running(server, world)
        asking.assert_answers_are_right()
        if hardship.clock is not None:
            answers = asyncio.run(while_the_clock_jumps(asking, hardship.clock))
            assert not traffic.wrong(world.cases * 6, answers)
        left = traffic.wait_until_idle(server)
        assert not any(left.values()), left
        assert server.process.poll() is None
        ends_in_the_middle_of_work(server)
    finally:
        server.stop()


def ends_in_the_middle_of_work(server: LiveServer) -> None:
    """SIGTERM beside answers and studies that would run on, of clients who have patience."""
    edit = {"sae": "relu", "feature": 1, "op": "add", "value": 1}
    steered = {"steering": {"interventions": [edit]}}
    reported = {"steering": {"interventions": [edit], "report": True, "read": {"sae": "relu"}}}
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True}
    study = {**steered, "texts": [{"prompt": PROMPT * 30}] * 20}
    bodies: list[tuple[str, dict[str, Any]]] = [
        *(("/v1/completions", {**body, **more}) for more in ({}, steered, reported)),
        ("/v1/steering/calibrate", study),
    ]

    async def run() -> list[httpx.Response | BaseException]:
        async with httpx.AsyncClient(base_url=server.base_url, timeout=END_TIMEOUT) as client:
            calls = [
                asyncio.ensure_future(client.post(path, json={**of_path, "stream": stream}))
                for path, of_path in bodies
                for stream in (False, True)
            ]
            while not (await asyncio.to_thread(server.metrics))["steering_slots_in_use"]:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*calls, return_exceptions=True)

    before = len(server.log.read_text())
    answers = asyncio.run(run())
    assert server.process.wait(END_TIMEOUT) == 0
    for answer in answers:
        if isinstance(answer, httpx.Response):
            whole = "[DONE]" in answer.text or '"finish_reason":"' in answer.text
            assert whole or answer.status_code != 200
        else:  # it came too late to be heard
            assert isinstance(answer, httpx.TransportError)
            assert not isinstance(answer, httpx.TimeoutException)
    assert "Traceback" not in server.log.read_text()[before:]


async def while_the_clock_jumps(asking: Running, clock: Path) -> list[Answer]:
    """Answers during which the time of day goes a day forth, two back, and ten years forth."""
    sending = asyncio.ensure_future(
        traffic.send_all(asking.server, asking.world.cases * 6, at_once=16)
    )
    rng = random.Random(0)
    jumps: list[Any] = ["+1d", "-1d", "+3650d", "+0d"]
    while not sending.done():
        new = clock.with_suffix(".new")
        new.write_text(f"{jumps[rng.randrange(len(jumps))]}\n")
        new.rename(clock)
        await asyncio.sleep(0.3)
    return await sending
