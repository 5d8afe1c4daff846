"""Alerts and the dashboard: what they ask for exists, and promtool accepts them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.metrics import MetricWrapperBase

from server import metrics
from tests.deploy.conftest import DEPLOY, read_yaml
from tests.deploy.watching import CONFIG, DASHBOARD, RULES, dashboard_queries, samples, vllm_series

PROVISIONING = DEPLOY / "grafana" / "provisioning"

#: Labels that Prometheus, Kubernetes or the histograms themselves add.
ADDED_LABELS = {"instance", "job", "le", "namespace", "pod"}


def steering_series() -> dict[str, set[str]]:
    """Scraped names of server/metrics.py, with their labels."""
    values = (*vars(metrics).values(), *metrics.WORKER_SERIES.values())
    found = [value for value in values if isinstance(value, MetricWrapperBase)]
    return {
        sample: set(metric._labelnames)
        for metric in found
        for sample in samples(str(metric._type), metric._name)
    }


def alert_queries() -> Iterator[str]:
    for group in read_yaml(RULES)["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


QUERIES = [*dashboard_queries(), *alert_queries()]


@pytest.mark.parametrize("query", QUERIES)
def test_every_series_exists(query: str) -> None:
    names = set(re.findall(r"\b(?:vllm:|steering_)\w+", query))
    assert names <= steering_series().keys() | vllm_series()
    assert names or query.startswith("up{")


@pytest.mark.parametrize("query", [query for query in QUERIES if "steering_" in query])
def test_every_label_of_a_steering_series_exists(query: str) -> None:
    series = steering_series()
    known = set().union(*(series[name] for name in re.findall(r"\bsteering_\w+", query)))
    selected = re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"", query)
    grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", query)
    used = set(selected).union(*(re.findall(r"\w+", group) for group in grouped))
    assert used <= known | ADDED_LABELS


def test_code_named_in_an_alert_is_one_of_the_error_table() -> None:
    codes = re.findall(r'code="(\w+)"', " ".join(alert_queries()))
    assert codes and set(codes) <= set(metrics.ERROR_CODES)


def test_every_steering_series_is_watched() -> None:
    shown = " ".join(dashboard_queries())
    assert [name for name in steering_series() if name not in shown] == []


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))


def test_dashboard_asks_the_provisioned_datasource() -> None:
    (source,) = read_yaml(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
    asked = set(re.findall(r'"uid": "(\w+)"', DASHBOARD.read_text(encoding="utf-8")))
    assert asked == {source["uid"]}
    (provider,) = read_yaml(PROVISIONING / "dashboards" / "dashboards.yaml")["providers"]
    mounts: list[Any] = read_yaml(DEPLOY / "compose.yaml")["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


@pytest.mark.parametrize(
    "check",
    [
        ("check", "rules", str(RULES)),
        ("check", "config", str(CONFIG)),
        ("test", "rules", str(RULES.with_name("alerts_test.yml"))),
    ],
    ids=lambda check: " ".join(check[:2]),
)
def test_promtool_accepts(check: tuple[str, ...], tool: Callable[[str], str]) -> None:
    ran = subprocess.run([tool("promtool"), *check], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
