"""A real server in processes of its own, one for all the tests of a session that ask for it.

A test module asks by `pytest_plugins = ("tests.engine.server",)`. The server's log is kept in
pytest's temporary folder, and its end is shown with every failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.models import make_tiny_sae

MODEL: Final = "smollm2"
MAX_NUM_SEQS: Final = 8
#: `l14` is the demo SAE; random ones at another layer (`second`, `topk`) and at the same one. They
#: have neither labels nor statistics.
TINY_SAES: Final[dict[str, dict[str, Any]]] = {
    "second": {"layer": 20, "seed": 3},
    "twin": {"layer": 14, "seed": 4},
    "topk": {"layer": 20, "seed": 5, "architecture": "topk"},
}
TINY_D_SAE: Final = 64
D_IN: Final = 576

#: Seconds until the server must answer, which a busy machine makes minutes of.
START_TIMEOUT: Final = 500.0
#: Seconds that any one request may take.
REQUEST_TIMEOUT: Final = 120.0
STOP_TIMEOUT: Final = 30.0
LOG_LINES_SHOWN: Final = 60

FLAGS: Final = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"),
    *("--max-num-seqs", str(MAX_NUM_SEQS), "--served-model-name", MODEL),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--enable-prompt-tokens-details", "--host", "127.0.0.1"),
)


@dataclass
class LiveServer:
    """The running server, and what tests ask of it again and again."""

    base_url: str
    log: Path
    model: Path
    saes: dict[str, Path]
    process: subprocess.Popen[bytes]
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(
            base_url=self.base_url,
            timeout=REQUEST_TIMEOUT,
            # The server closes idle connections after 5 s; one that it closes just as a request is
            # sent would fail that request.
            limits=httpx.Limits(keepalive_expiry=1.0),
        )

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """A greedy request unless `body` says otherwise."""
        return self.client.post(path, json={"model": MODEL, "temperature": 0, **body})

    def chat(self, text: str, steering: object = None, **more: Any) -> httpx.Response:
        """One user's message; without `steering` the field is left out."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}
        return self.post("/v1/chat/completions", with_steering(body, steering))

    def complete(self, prompt: object, steering: object = None, **more: Any) -> httpx.Response:
        """A completion of a text, of token ids, or of several of them."""
        body = {"prompt": prompt, "max_tokens": 8, **more}
        return self.post("/v1/completions", with_steering(body, steering))

    def tokens(self, prompt: object, steering: object = None, **more: Any) -> list[int]:
        """The token ids of a completion that must succeed."""
        choice = self.choice(prompt, steering, **more)
        found: list[int] = choice["token_ids"]
        return found

    def choice(self, prompt: object, steering: object = None, **more: Any) -> dict[str, Any]:
        """The only choice of a completion that must succeed, token ids and logprobs included."""
        response = self.complete(prompt, steering, **{**TOKENS_AND_LOGPROBS, **more})
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return dict(choice)

    def stream(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """The data of a stream's events, parsed where it is JSON."""
        response = self.post(path, {**body, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        prefix = "data: "
        data = [
            line.removeprefix(prefix)
            for line in response.text.splitlines()
            if line.startswith(prefix)
        ]
        return [json.loads(line) if line.startswith("{") else line for line in data]

    def metrics(self) -> dict[str, float]:
        """The `steering_*` samples of /metrics by name and labels, as Prometheus writes them."""
        text = self.client.get("/metrics").text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("steering"))
        return {name: float(value) for name, value in samples}

    def last_log_lines(self, count: int = LOG_LINES_SHOWN) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def stop(self) -> None:
        """End the process group, politely first."""
        self.client.close()
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT)


TOKENS_AND_LOGPROBS: Final[dict[str, Any]] = {"logprobs": 1, "return_token_ids": True}


def with_steering(body: dict[str, Any], steering: object) -> dict[str, Any]:
    return body if steering is None else {**body, "steering": steering}


@pytest.fixture(scope="session")
def live_server(
    demo_model: Path, demo_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """SmolLM2 in float32 with the demo SAE and two random ones."""
    folder = tmp_path_factory.mktemp("server")
    saes = {"l14": demo_sae}
    for name, how in TINY_SAES.items():
        saes[name] = make_tiny_sae(folder / name, d_in=D_IN, d_sae=TINY_D_SAE, **how)
    # Exact answers are compared, and a check beside one would change its batch.
    with serving(demo_model, saes, folder / "server.log", "--no-steering-self-check") as server:
        yield server


@contextlib.contextmanager
def serving(model: Path, saes: Mapping[str, Path], log: Path, *flags: str) -> Iterator[LiveServer]:
    """A server, see `start`, once it answers; stopped at the end."""
    server = start(model, saes, log, *flags)
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.stop()


def start(model: Path, saes: Mapping[str, Path], log: Path, *flags: str) -> LiveServer:
    """Start `python -m server serve`; it does not answer yet. `flags` overrule `FLAGS`."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "server", "serve", str(model), *FLAGS, *flags),
                *(word for name, path in saes.items() for word in ("--sae", f"{name}={path}")),
                *("--port", str(port)),
            ],
            cwd=Path(__file__).parents[2],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    return LiveServer(f"http://127.0.0.1:{port}", log, model, dict(saes), process)


def environment() -> dict[str, str]:
    """This process's environment without what in-process engines put there."""
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {
        **inherited,
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def wait_until_ready(server: LiveServer) -> None:
    """Return once the server answers; fail with its log where it ends or stays silent."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            if server.client.get("/health").is_success:
                return
        time.sleep(0.1)
    pytest.fail(f"the server did not start:\n{server.last_log_lines()}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log with a failure."""
    report = yield
    server = getattr(item, "funcargs", {}).get("live_server")
    if report.failed and isinstance(server, LiveServer):
        report.sections.append((f"server log, {server.log}", server.last_log_lines()))
    return report
