"""A real Prometheus scrapes series of the server's names, and every panel's query gets data."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

from tests.deploy.conftest import free_port
from tests.deploy.test_watching import (
    alert_queries,
    dashboard_queries,
    steering_series,
    vllm_series,
)

SCRAPES = 4
START_SECONDS = 30


class Metrics(BaseHTTPRequestHandler):
    """Every series of the server, each higher at every scrape; nothing else of vLLM runs."""

    scrapes = 0

    def do_GET(self) -> None:
        Metrics.scrapes += 1
        lines = []
        for name in sorted(vllm_series()):
            for le in ("0.1", "+Inf") if name.endswith("_bucket") else ("",):
                label = f', le="{le}"' if le else ""
                lines.append(f'{name}{{model_name="m", engine="0"{label}}} {Metrics.scrapes}')
        for name, labels in sorted(steering_series().items()):
            selected = ", ".join(f'{label}="a"' for label in sorted(labels))
            lines.append(f"{name}{{{selected}}} {Metrics.scrapes}")
        payload = "\n".join([*lines, ""]).encode()
        self.send_response(200)
        self.send_header("content-type", "text/plain; version=0.0.4")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def prometheus(
    tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of a Prometheus that has scraped a few times."""
    program = tool("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    with ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = write_config(folder, f"127.0.0.1:{server.server_address[1]}")
        address = f"127.0.0.1:{free_port()}"
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for_scrapes(process)
            with httpx.Client(base_url=f"http://{address}/api/v1/", timeout=10) as client:
                yield client
        finally:
            process.terminate()
            process.wait(timeout=30)
            server.shutdown()


def write_config(folder: Path, target: str) -> Path:
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "vllm-sae", "static_configs": [{"targets": [target]}]}],
    }
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def wait_for_scrapes(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while Metrics.scrapes <= SCRAPES:
        assert process.poll() is None, "Prometheus ended"
        assert time.monotonic() < deadline, f"{Metrics.scrapes} scrapes in {START_SECONDS} s"
        time.sleep(0.2)


def test_every_panel_gets_data(prometheus: httpx.Client) -> None:
    for query in dashboard_queries():
        filled = query.replace("$__rate_interval", "30s").replace("$instance", ".*")
        answer = prometheus.get("query", params={"query": filled}).json()
        assert answer["status"] == "success", (query, answer)
        assert answer["data"]["result"], query


def test_every_alert_can_be_evaluated(prometheus: httpx.Client) -> None:
    for query in alert_queries():
        answer = prometheus.get("query", params={"query": query}).json()
        assert answer["status"] == "success", (query, json.dumps(answer))
