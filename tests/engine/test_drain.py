"""SIGTERM with `--shutdown-timeout`: what runs ends whole, reports and spans included."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.engine import server
from tests.engine.server import LiveServer
from tests.models import make_tiny_sae

# The first test to ask waits for the server.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT: Final = "the lazy dog"
#: Long enough that SIGTERM comes in the middle of all of them.
MAX_TOKENS: Final = 200
DRAIN_SECONDS: Final = 60
STEERING: Final[dict[str, Any]] = {
    "interventions": [
        {"feature": 3, "op": "clamp", "value": 6},
        {"feature": 5, "op": "ablate", "positions": {"prompt": False}},
    ],
    "positions": {"special_tokens": True},
    "report": True,
}
#: The bodies that run when the signal comes.
BODIES: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"steering": STEERING},
    {"steering": {**STEERING, "read": {"top_k": 1}}, "n": 2, "temperature": 1, "seed": 1},
)


@dataclass(frozen=True)
class Drained:
    """What was left of a server that got SIGTERM while `BODIES` ran."""

    #: The events of each stream; None stands for `[DONE]`.
    streams: list[list[Any]]
    exit_code: int
    #: The attributes of each `llm_request` span.
    spans: list[dict[str, Any]]
    #: All that the collector received.
    exported: bytes


class Collector(BaseHTTPRequestHandler):
    """Keeps what OTLP exporters send over HTTP."""

    received: list[bytes]

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """The address of an OTLP collector, and what it has received."""
    received: list[bytes] = []
    handler = type("Handler", (Collector,), {"received": received})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/v1/traces", received
        listening.shutdown()


@pytest.fixture(scope="module")
def drained(
    collector: tuple[str, list[bytes]],
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Drained:
    folder = tmp_path_factory.mktemp("drain")
    address, received = collector
    flags = {
        "--max-model-len": "256",
        "--shutdown-timeout": str(DRAIN_SECONDS),
        "--otlp-traces-endpoint": address,
    }
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        running = server.start(
            tiny_model("llama"),
            {"a": make_tiny_sae(folder / "sae")},
            folder / "server.log",
            "--no-steering-self-check",  # it has a span of its own
            *(word for flag in flags.items() for word in flag),
        )
    try:
        server.wait_until_ready(running)
        streams = stream_until_sigterm(running)
        exit_code = running.process.wait(timeout=DRAIN_SECONDS)
    finally:
        running.stop()
    spans = [
        {attribute.key: value_of(attribute.value) for attribute in span.attributes}
        for payload in received
        for resource in ExportTraceServiceRequest.FromString(payload).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if span.name == "llm_request"
    ]
    return Drained(streams, exit_code, spans, b"".join(received))


def stream_until_sigterm(running: LiveServer) -> list[list[Any]]:
    """Stream all bodies at once; the signal is sent when each has given its first token."""
    waiting = set(range(len(BODIES)))

    def first_token(which: int) -> None:
        if which in waiting:
            waiting.remove(which)
            if not waiting:
                running.process.send_signal(signal.SIGTERM)

    with ThreadPoolExecutor(len(BODIES)) as pool:
        calls = [pool.submit(stream, running, which, first_token) for which in range(len(BODIES))]
        return [call.result(timeout=2 * DRAIN_SECONDS) for call in calls]


def stream(running: LiveServer, which: int, on_event: Callable[[int], None]) -> list[Any]:
    asked = {
        **{"model": server.MODEL, "prompt": PROMPT, "temperature": 0, "stream": True},
        **{"max_tokens": MAX_TOKENS, "ignore_eos": True, "stream_options": {"include_usage": True}},
        **BODIES[which],
    }
    events: list[Any] = []
    url = f"{running.base_url}/v1/completions"
    with httpx.stream("POST", url, json=asked, timeout=server.REQUEST_TIMEOUT) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
                on_event(which)
            elif line == "data: [DONE]":
                events.append(None)
    return events


def value_of(value: Any) -> Any:
    """A protobuf `AnyValue` as Python's."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(item) for item in value.array_value.values]
    return getattr(value, kind)


@pytest.mark.parametrize("which", range(len(BODIES)))
def test_what_runs_at_sigterm_ends_whole_with_its_report(drained: Drained, which: int) -> None:
    body, choices = BODIES[which], BODIES[which].get("n", 1)
    *events, done = drained.streams[which]
    assert done is None
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert reasons.count("length") == choices
    usage = next(event["usage"] for event in events if event.get("usage"))
    assert usage["completion_tokens"] == choices * MAX_TOKENS
    reports = [event["steering"] for event in events if "steering" in event]
    assert len(reports) == ("steering" in body)
    for report in reports:
        for choice in report.get("choices", [report]):
            # All but the last token, which never enters the model; the second spares the prompt.
            clamped, ablated = (edit["tokens_edited"] for edit in choice["interventions"])
            assert clamped == usage["prompt_tokens"] + MAX_TOKENS - 1
            assert ablated == MAX_TOKENS - 1


def test_the_server_then_ends_with_0(drained: Drained) -> None:
    assert drained.exit_code == 0


def test_spans_of_steered_requests_say_what_was_done(drained: Drained) -> None:
    steered = [span for span in drained.spans if "vllm_sae.saes" in span]
    # A span for each choice.
    assert (len(drained.spans), len(steered)) == (4, 3)
    for span in steered:
        assert span["vllm_sae.saes"] == ["a"]
        assert span["vllm_sae.ops"] == ["ablate", "clamp"]
        assert (span["vllm_sae.edits"], span["vllm_sae.report"]) == (2, True)
    assert [span["vllm_sae.read"] for span in steered].count(True) == 2


def test_spans_hold_no_text(drained: Drained) -> None:
    assert drained.spans
    assert PROMPT.encode() not in drained.exported
