"""vLLM's own router in front: `steering` passes it, in requests and in responses."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.deploy.conftest import free_port

STEERING = {
    "interventions": [
        {"feature": 3, "op": "clamp", "value": 1.15, "unit": "max_act"},
        {"sae": "a", "feature": 7, "op": "ablate", "positions": {"prompt": False, "end": 9}},
    ],
    "error_term": False,
    "report": True,
    "read": {"top_k": 2},
}
START_SECONDS = 30


class Worker(BaseHTTPRequestHandler):
    """A server that answers with what it was sent."""

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [], "path": self.path})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        key = self.headers["authorization"]
        answer = {
            "steering": body.get("steering"),
            "key": key,
            "port": self.connection.getsockname()[1],
        }
        self._answer({"id": "1", "path": self.path, **answer})

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, content: dict[str, Any]) -> None:
        payload = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture(scope="module")
def workers() -> Iterator[list[str]]:
    """The addresses of two servers."""
    with contextlib.ExitStack() as running:
        addresses = []
        for _ in range(2):
            server = running.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Worker))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            running.callback(server.shutdown)
            addresses.append(f"http://127.0.0.1:{server.server_port}")
        yield addresses


@pytest.fixture(scope="module")
def router(workers: list[str], tool: Callable[[str], str]) -> Iterator[httpx.Client]:
    port, metrics_port = free_port(), free_port()
    command = [tool("vllm-router"), "--port", port, "--worker-urls", *workers]
    command += ["--policy", "consistent_hash", "--prometheus-port", metrics_port]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            wait_until_ready(client, process)
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the router ended"
        try:
            if client.get("/health").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"the router did not answer within {START_SECONDS} s")


def test_steering_passes_the_router_unchanged(router: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": messages},
        "/v1/completions": {"prompt": "hi"},
        "/v1/responses": {"input": "hi"},
        "/v1/messages": {"messages": messages, "max_tokens": 4},
    }
    for path, body in bodies.items():
        seen = router.post(path, json={"model": "tiny", **body, "steering": STEERING}).json()
        assert (seen["path"], seen["steering"]) == (path, STEERING)


def test_a_session_keeps_its_replica_however_it_steers(router: httpx.Client) -> None:
    served = {}
    for session in range(16):
        ports = set()
        for steering in (None, STEERING):
            messages = [{"role": "user", "content": f"{session} {steering is None}"}]
            body = {"model": "tiny", "messages": messages, "steering": steering}
            headers = {"x-session-id": f"session {session}"}
            answer = router.post("/v1/chat/completions", json=body, headers=headers)
            ports.add(answer.json()["port"])
        (served[session],) = ports
    assert len(set(served.values())) == 2


def test_the_clients_key_reaches_completions(router: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "hi"}
    seen = router.post("/v1/completions", json=body, headers={"authorization": "Bearer sesame"})
    assert seen.json()["key"] == "Bearer sesame"


def test_sae_routes_pass_the_router(router: httpx.Client) -> None:
    for path in ("/v1/saes", "/v1/saes/a", "/v1/saes/a/features/3"):
        assert router.get(path).json()["path"] == path
    inspect = "/v1/saes/a/inspect"
    assert router.post(inspect, json={"prompt": "x"}).json()["path"] == inspect
