"""LiteLLM as a proxy in front of the server, on loopback."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any, Final

import httpx
import pytest
import yaml

from tests.clients.conftest import (
    CLIENTS,
    MAX_TOKENS,
    PRESET,
    QUESTION,
    STEERING,
    Clients,
)
from tests.engine.server import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

START_TIMEOUT: Final = 300.0
STOP_TIMEOUT: Final = 20.0


@contextlib.contextmanager
def proxy(clients: Clients) -> Iterator[httpx.Client]:
    """The proxy, with names of its own for the base, the preset and a steered base."""

    def entry(name: str, model: str, **more: Any) -> dict[str, Any]:
        served = {"model": f"hosted_vllm/{model}", "api_base": clients.base_url, "api_key": "none"}
        return {"model_name": name, "litellm_params": {**served, **more}}

    key = f"sk-{secrets.token_hex(32)}"  # it does not start without one
    steered = {"extra_body": {"steering": STEERING}}
    config = {
        "model_list": [
            entry("base", MODEL),
            entry("preset", PRESET),
            entry("steered", MODEL, **steered),
        ],
        "litellm_settings": {"num_retries": 0, "telemetry": False},
        "general_settings": {"master_key": key},
    }
    file, log = clients.folder / "config.yaml", clients.folder / "proxy.log"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(CLIENTS / "litellm" / "bin" / "litellm", "--config", file, "--host", "127.0.0.1"),
                *("--port", str(port), "--telemetry", "False"),
            ],
            cwd=clients.folder,
            env=clients.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    client = httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        headers={"Authorization": f"Bearer {key}"},
        timeout=120.0,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health/liveliness").is_success:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(f"the proxy did not start:\n{log.read_text()[-4000:]}", pytrace=False)
        yield client
    finally:
        client.close()
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT)
    clients.assert_stayed()


@pytest.mark.needs("litellm/litellm/proxy")
def test_litellm_hands_on_presets_fields_and_reports(clients: Clients) -> None:
    base, steered = clients.answers()
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    with proxy(clients) as client:

        def ask(model: str, **more: Any) -> dict[str, Any]:
            answer = client.post("/v1/chat/completions", json={**body, "model": model, **more})
            assert answer.status_code == 200, answer.text
            content: dict[str, Any] = answer.json()
            return content

        def text(content: dict[str, Any]) -> str:
            said: str = content["choices"][0]["message"]["content"]
            return said

        assert text(ask("base")) == base
        assert text(ask("preset")) == steered
        by_config, by_field = ask("steered"), ask("base", steering=STEERING)
        assert text(by_config) == text(by_field) == steered
        assert "steering" in by_field
        refused = client.post(
            "/v1/chat/completions",
            json={
                **body,
                "model": "base",
                "steering": {"interventions": [{"feature": -1, "op": "ablate"}]},
            },
        )
        assert refused.status_code == 400
        assert "steering.interventions[0]" in refused.text
