"""The steering_* series."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from server.metrics import WorkerSeries
from steering.worker_stats import WorkerStats
from tests.server.conftest import Server, StartServer
from tests.server.counters import value

STATS: dict[str, Any] = {
    "slots_in_use": 2,
    "slots_capacity": 8,
    "rows_in_use": 3,
    "rows_capacity": 64,
    "results_held": 1,
    "edited_tokens": 40,
    "skipped_tokens": 5,
    "op_seconds": 0.5,
}


def scraped(server: Server, line: str) -> bool:
    return line in server.client.get("/metrics").text.splitlines()


def complete(server: Server, steering: Any) -> None:
    server.client.post("/v1/completions", json={"prompt": "x", "steering": steering})


def test_request_is_counted_once_for_each_sae_and_op(server: Server) -> None:
    before = {op: value("steering_requests_total", sae="a", op=op) for op in ("add", "cap", "read")}
    edits = [{"feature": i, "op": "add", "value": 1} for i in range(3)]
    complete(
        server,
        {"interventions": [*edits, {"feature": 9, "op": "cap", "value": 1}], "read": {}},
    )
    after = {op: value("steering_requests_total", sae="a", op=op) for op in before}
    assert {op: after[op] - before[op] for op in before} == {"add": 1, "cap": 1, "read": 1}


def test_refusal_is_counted_by_code_and_not_as_a_request(server: Server) -> None:
    rejected = value("steering_rejected_total", code="feature_out_of_range")
    accepted = value("steering_requests_total", sae="a", op="ablate")
    complete(server, {"interventions": [{"feature": 999, "op": "ablate"}]})
    assert value("steering_rejected_total", code="feature_out_of_range") == rejected + 1
    assert value("steering_requests_total", sae="a", op="ablate") == accepted


def test_refusal_is_logged_with_its_code_and_without_text(server: Server, caplog: Any) -> None:
    with caplog.at_level("INFO", logger="vllm.sae.server"):
        server.client.post(
            "/v1/completions", json={"prompt": "my secret", "steering": {"my secret": 1}}
        )
    (record,) = [r for r in caplog.records if r.name == "vllm.sae.server"]
    assert record.getMessage() == "refused '/v1/completions': unknown_field"


def test_every_series_is_there_from_the_start(start: StartServer) -> None:
    server = start(saes={"fresh": {}})
    assert scraped(server, 'steering_requests_total{op="scale",sae="fresh"} 0.0')
    text = server.client.get("/metrics").text
    for name in (
        *("rejected_total", "edited_tokens_total", "skipped_tokens_total", "op_seconds_total"),
        *("slots_in_use", "slots_capacity", "rows_in_use", "rows_capacity", "results_held"),
    ):
        assert f"\nsteering_{name}" in text


def test_workers_are_asked_when_metrics_are_scraped(start: StartServer) -> None:
    edited = value("steering_edited_tokens_total")
    server = start(stats=[STATS, {**STATS, "slots_in_use": 0, "edited_tokens": 2}])
    assert scraped(server, f"steering_edited_tokens_total {edited + 40}")
    assert scraped(server, f"steering_edited_tokens_total {edited + 42}")
    assert value("steering_slots_in_use") == 0
    assert value("steering_slots_capacity") == 8
    assert value("steering_rows_capacity") == 64


async def test_slow_workers_do_not_hold_up_a_scrape_and_lose_nothing() -> None:
    asked = 0
    answer = asyncio.Event()

    async def fetch() -> Any:
        nonlocal asked
        asked += 1
        await answer.wait()
        return WorkerStats(**STATS)

    edited = value("steering_edited_tokens_total")
    series = WorkerSeries(fetch, timeout=0.01)
    await series.refresh()
    await series.refresh()
    assert asked == 1
    assert value("steering_edited_tokens_total") == edited
    answer.set()
    await series.refresh()
    assert value("steering_edited_tokens_total") == edited + 40


async def test_dead_engine_leaves_the_last_values() -> None:
    async def fetch() -> Any:
        raise RuntimeError("engine dead")

    async def alive() -> WorkerStats:
        return WorkerStats(slots_in_use=7)

    await WorkerSeries(alive).refresh()
    await WorkerSeries(fetch).refresh()
    assert value("steering_slots_in_use") == 7


ONE_PROCESS = """
import asyncio, sys
from server.metrics import REQUESTS, WorkerSeries
from steering.worker_stats import WorkerStats
async def fetch():
    return WorkerStats(slots_in_use=int(sys.argv[1]), slots_capacity=8, rows_in_use=1,
        rows_capacity=2, results_held=0, edited_tokens=10, skipped_tokens=0, op_seconds=0.0)
REQUESTS.labels(sae="a", op="add").inc()
asyncio.run(WorkerSeries(fetch).refresh())
"""

ANOTHER_PROCESS = """
from prometheus_client import generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry
print(generate_latest(get_prometheus_registry()).decode())
"""


def test_numbers_of_several_workers_add_up() -> None:
    told = [{**STATS, "op_seconds": 0.5}, {"edited_tokens": 2}]
    assert WorkerStats.total(told) == WorkerStats(**{**STATS, "edited_tokens": 42})


def test_api_servers_add_up_their_counters(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def python(*arguments: str) -> str:
        command = [sys.executable, "-c", *arguments]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    python(ONE_PROCESS, "3")
    python(ONE_PROCESS, "5")
    lines = python(ANOTHER_PROCESS).splitlines()
    assert 'steering_requests_total{op="add",sae="a"} 2.0' in lines
    assert "steering_edited_tokens_total 20.0" in lines
    assert "steering_slots_in_use 5.0" in lines
