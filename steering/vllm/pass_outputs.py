"""Sends what a pass found along with its sampled tokens: which ``stop_when`` fired, what was read.

A token is judged in the pass in which it enters the model, and that pass samples the token after
it. So the scheduler learns of a ``stop_when`` together with that next token, drops the token, and
ends the request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from steering.worker.ops.layout import NEVER
from steering.worker.record import RequestRecord
from steering.worker.stops import Stops
from steering.worker.streamed_read import StreamedRead
from steering.worker.worker_state import SteeringState

#: Attribute of a ``ModelRunnerOutput`` that holds the `Findings` of its pass.
FINDINGS: Final = "steering_findings"


@dataclass(frozen=True)
class Findings:
    """What one pass found, as the scheduler gets it.

    Attributes:
        fired: request id to the position at which a ``stop_when`` fired.
        read: request id to what was read, for requests that stream it.
    """

    fired: dict[str, int] = field(default_factory=dict)
    read: dict[str, StreamedRead] = field(default_factory=dict)


def attach(runner: Any, state: SteeringState) -> None:
    """Have a runner's sampled tokens carry what its last pass found."""
    sample_tokens = runner.sample_tokens

    def _sample_tokens(*args: Any, **kwargs: Any) -> Any:
        stops, streaming = state.stops(), state.records.streaming()
        found = _Found(stops, streaming, state) if stops is not None or streaming else None
        return carrying(sample_tokens(*args, **kwargs), found)

    runner.sample_tokens = _sample_tokens


def carrying(output: Any, found: _Found | None) -> Any:
    """A runner's ``output`` with what was found.

    An output without requests stays as it is: vLLM shares it among passes, or it comes from a
    pipeline stage that samples nothing.
    """
    if found is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return _Carrying(output, found)
    if isinstance(output, ModelRunnerOutput) and output.req_ids:
        setattr(output, FINDINGS, found.wait())
    return output


def findings_in(output: Any) -> Findings:
    """The findings that a ``ModelRunnerOutput`` carries; empty ones if it carries none."""
    return getattr(output, FINDINGS, None) or Findings()


class _Found:
    """What one pass found, on its way to the host or already there."""

    def __init__(
        self, stops: Stops | None, streaming: dict[str, RequestRecord], state: SteeringState
    ) -> None:
        self._streaming = streaming
        self._state = state
        self._stops: _StopsOnHost | None = None
        if stops is not None:
            self._stops = _StopsOnHost(stops, state)

    def wait(self) -> Findings:
        """Wait for the copies; the pass's sampled tokens arrive after them."""
        fired = {} if self._stops is None else self._stops.fired()
        return Findings(fired, self._state.take_streamed(self._streaming))


class _StopsOnHost:
    """Copies to the host of one pass's `Stops`, under way or done."""

    def __init__(self, stops: Stops, state: SteeringState) -> None:
        self._req_ids = stops.req_ids
        # Looked up now, since the next pass may have changed them by the time the copies are read.
        self._records: list[RequestRecord | None] = [
            state.records.running(req_id) for req_id in stops.req_ids
        ]
        self._copied: Any = None
        self._columns = [_to_host(c) for c in (stops.position, stops.gate, stops.activation)]
        if stops.position.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def fired(self) -> dict[str, int]:
        """Wait for the copies, and note what fired in its record before anybody is told.

        Returns:
            Request id to position, of the requests of which a ``stop_when`` fired.
        """
        if self._copied is not None:
            self._copied.synchronize()
        found = {}
        columns = (column.tolist() for column in self._columns)
        for req_id, record, position, gate, activation in zip(
            self._req_ids, self._records, *columns, strict=True
        ):
            if position == NEVER:
                continue
            found[req_id] = position
            if record is not None:
                record.put_stop(position, gate, activation)
        return found


class _Carrying(AsyncModelRunnerOutput):
    """An output still on its way to the host, with what was found beside it."""

    def __init__(self, output: AsyncModelRunnerOutput, found: _Found) -> None:
        self._output = output
        self._found = found

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        setattr(output, FINDINGS, self._found.wait())
        return output


def _to_host(source: Tensor) -> Tensor:
    if not source.is_cuda:
        return source
    target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return target.copy_(source, non_blocking=True)
