"""The queries of the alerts and of the dashboard, and the series that vLLM has."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tests.deploy.conftest import DEPLOY

RULES = DEPLOY / "prometheus" / "alerts.yml"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "vllm-sae.json"


def samples(kind: str, name: str) -> list[str]:
    """The names under which a metric of the client library is scraped."""
    if kind == "counter":
        return [f"{name.removesuffix('_total')}_total"]
    if kind == "histogram":
        return [f"{name}_bucket", f"{name}_sum", f"{name}_count"]
    return [name]


def vllm_series() -> set[str]:
    """Scraped names in vLLM's source, which is read, not imported: that takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "v1/metrics/loggers.py").read_text(encoding="utf-8")
    found = re.findall(r'_(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', source)
    assert len(found) > 20
    return {sample for kind, name in found for sample in samples(kind, name)}


def dashboard_queries() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
