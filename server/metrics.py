"""The `steering_*` series of /metrics.

Counters of the workers arrive as deltas, so that several API server processes may each add what
they fetched: the multi-process registry sums counters and keeps the latest value of a gauge.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import Field, fields
from typing import Any, Final, get_args

from prometheus_client import Counter, Gauge

from steering.errors import ErrorCode
from steering.request.limits import OPS
from steering.request.spec import SteeringSpec
from steering.worker_stats import GROWS, HELP, WorkerStats

logger = logging.getLogger("vllm.sae.server")

READ_OP: Final = "read"
#: How long a scrape waits for the workers before it is answered with the values of the last one.
SCRAPE_TIMEOUT_SECONDS: Final = 1.0
#: Every code of the error table, so that a series exists before the first refusal.
ERROR_CODES: Final[tuple[str, ...]] = get_args(ErrorCode)

REQUESTS: Final = Counter(
    "steering_requests",
    "Accepted requests that use an SAE, by what they do with it.",
    ["sae", "op"],
)
PRESET_REQUESTS: Final = Counter(
    "steering_preset_requests",
    "Accepted requests that a preset steers, by its name; also as the default.",
    ["preset"],
)
REJECTED: Final = Counter(
    "steering_rejected", "Refused requests, by the code of the error.", ["code"]
)


def _series(field: Field[Any]) -> Counter | Gauge:
    name, meaning = f"steering_{field.name}", field.metadata[HELP]
    if field.metadata[GROWS]:
        return Counter(name, meaning)
    return Gauge(name, meaning, multiprocess_mode="mostrecent")


#: By the names of `WorkerStats`' fields.
WORKER_SERIES: Final = {field.name: _series(field) for field in fields(WorkerStats)}


def start_series(saes: Iterable[str], presets: Iterable[str] = ()) -> None:
    """Create every series that can be named in advance, at 0."""
    for code in ERROR_CODES:
        REJECTED.labels(code=code)
    for sae in saes:
        for op in (*OPS, READ_OP):
            REQUESTS.labels(sae=sae, op=op)
    for preset in presets:
        PRESET_REQUESTS.labels(preset=preset)


def count_accepted(spec: SteeringSpec, preset: str | None = None) -> None:
    """Count one request: once for each SAE and operation in it, and once for its preset."""
    if preset is not None:
        PRESET_REQUESTS.labels(preset=preset).inc()
    uses = {(edit.sae, edit.op) for edit in spec.edits}
    if spec.read is not None:
        uses.add((spec.read.sae, READ_OP))
    for sae, op in uses:
        REQUESTS.labels(sae=sae, op=op).inc()


class WorkerSeries:
    """Fetches the workers' numbers when /metrics is scraped, one fetch at a time."""

    def __init__(
        self,
        fetch: Callable[[], Awaitable[WorkerStats]],
        timeout: float = SCRAPE_TIMEOUT_SECONDS,
    ) -> None:
        self._fetch = fetch
        self._timeout = timeout
        self._running: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Bring the series up to date, or give up waiting after the time-out.

        A fetch that takes longer goes on: the deltas it brings are nowhere else.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._update())
        await asyncio.wait({self._running}, timeout=self._timeout)

    async def _update(self) -> None:
        try:
            stats = await self._fetch()
        except Exception as error:  # a scrape is answered whatever state the engine is in
            logger.warning("the workers' steering statistics could not be fetched: %s", error)
            return
        for name, series in WORKER_SERIES.items():
            value = getattr(stats, name)
            if isinstance(series, Counter):
                series.inc(value)
            else:
                series.set(value)
