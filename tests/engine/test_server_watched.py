"""A real Prometheus scrapes a real server, and a real server logs what it refuses."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest
import yaml

from tests.demo_sae import ELVES
from tests.deploy.conftest import find_tool, free_port, read_yaml
from tests.deploy.watching import CONFIG, RULES, dashboard_queries

if TYPE_CHECKING:
    from tests.engine.server import LiveServer

pytest_plugins = ("tests.engine.server",)
# The first test to ask waits for the server.
pytestmark = pytest.mark.timeout(600)

TEXT: Final = "Tell me about your day."
STEERING: Final = {"interventions": [{"sae": "l14", "feature": ELVES, "op": "clamp", "value": 40}]}
REFUSED: Final[dict[str, Any]] = {
    "unknown_sae": {"read": {"sae": "nobody"}},
    "unknown_field": {"strength": 3},
    "invalid_type": True,
}
#: Scrapes that the server's own traffic must be older than.
SCRAPES: Final = 4
SCRAPE_SECONDS: Final = 60


@pytest.fixture(scope="module")
def prometheus(
    live_server: LiveServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of a Prometheus that has scraped the server and evaluates the deployed alerts."""
    program = find_tool("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    config = read_yaml(CONFIG)
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    job["scrape_timeout"] = "1s"
    job["static_configs"] = [{"targets": [live_server.base_url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(RULES, folder)

    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1/", timeout=10) as client:
            wait_for_scrapes(client, process, 1)
            live_server.chat(TEXT)
            live_server.chat(TEXT, STEERING)
            live_server.chat(TEXT, {"read": {"sae": "nobody"}})
            wait_for_scrapes(client, process, 1 + SCRAPES)
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for_scrapes(
    client: httpx.Client, process: subprocess.Popen[bytes], more_than: int
) -> None:
    """Return once the server was scraped so much more often than it had been."""
    deadline = time.monotonic() + SCRAPE_SECONDS
    query = 'sum_over_time(up{job="vllm-sae"}[5m])'
    first: float | None = None
    while time.monotonic() < deadline:
        assert process.poll() is None, "Prometheus ended"
        try:
            found = ask(client, query)
        except (httpx.TransportError, httpx.HTTPStatusError):  # it is starting
            found = []
        scrapes = float(found[0]["value"][1]) if found else 0.0
        first = scrapes if first is None else first
        if scrapes - first >= more_than:
            return
        time.sleep(0.2)
    raise AssertionError(f"not {more_than} scrapes in {SCRAPE_SECONDS} s")


def ask(client: httpx.Client, query: str) -> list[dict[str, Any]]:
    """The instant vector that a query gives."""
    answer = client.get("query", params={"query": query}).raise_for_status().json()
    return list(answer["data"]["result"])


def test_every_panel_of_the_dashboard_gets_data(prometheus: httpx.Client) -> None:
    queries = [
        query.replace("$__rate_interval", "1m").replace("$instance", ".*")
        for query in dashboard_queries()
    ]
    assert [query for query in queries if not ask(prometheus, query)] == []


def test_prometheus_has_the_servers_own_numbers(
    prometheus: httpx.Client, live_server: LiveServer
) -> None:
    served = live_server.metrics()
    for name in (
        'steering_requests_total{op="clamp",sae="l14"}',
        'steering_rejected_total{code="unknown_sae"}',
        "steering_edited_tokens_total",
        "steering_slots_capacity",
    ):
        (scraped,) = ask(prometheus, name)
        assert float(scraped["value"][1]) == served[name] > 0


def test_every_alert_is_evaluated_and_a_healthy_server_wakes_nobody(
    prometheus: httpx.Client,
) -> None:
    (group,) = prometheus.get("rules").json()["data"]["groups"]
    assert len(group["rules"]) > 5
    for rule in group["rules"]:
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
        assert rule["state"] != "firing", rule["name"]


@pytest.mark.parametrize("code", REFUSED)
def test_a_refusal_is_one_line_of_the_log_with_its_code(live_server: LiveServer, code: str) -> None:
    prompt = "Xylophonquarz"
    before = live_server.log.read_text(errors="replace")
    response = live_server.chat(prompt, REFUSED[code])
    assert response.status_code == 400
    lines = live_server.log.read_text(errors="replace").removeprefix(before).splitlines()
    # Beside the line of the access log, which every request has.
    (refusal,) = [line for line in lines if "/v1/chat/completions" in line and "HTTP" not in line]
    assert re.search(rf"refused '/v1/chat/completions': {code}$", refusal)
    assert not [line for line in lines if prompt in line]
