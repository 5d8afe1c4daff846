"""Bringing reports and reads from the workers back to whoever asked.

A caller opens a ticket and puts it into the request; when the engine's output stream of that
request ends, the workers' records are fetched by one RPC, cut to the positions that count, and laid
down under the ticket.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sae.self_check import Measured
from steering.request.spec import SteeringSpec
from steering.vllm.door import FIELD, TICKET, catalog_for, result_key
from steering.vllm.drain import TAKE
from steering.worker.probes import features_read
from steering.worker.record_store import MAX_FINISHED_RECORDS

#: Seconds between two looks at whether the engine that is asked for results still lives.
LIVENESS_SECONDS: Final = 1.0


@dataclass
class ChoiceResult:
    """What one choice's steering did, in the shapes of the contract."""

    interventions: list[dict[str, Any]]
    read: dict[str, Any] | None
    tokens_cached: int
    aggregate: list[list[float]] | None = None
    measured: Measured | None = None

    def to_json(self, report: bool) -> dict[str, Any]:
        """The response object's ``steering``."""
        body: dict[str, Any] = {}
        if report:
            body["interventions"] = self.interventions
            body["tokens_cached"] = self.tokens_cached
        if self.read is not None:
            body["read"] = self.read
        return body


@dataclass
class _Tracker:
    """One engine request while its outputs pass by.

    ``tokens`` maps a child's index to its output tokens so far.
    """

    tokens: dict[int, list[int]] = field(default_factory=dict)
    prompt: Sequence[int] = ()
    cached: int = 0

    def see(self, output: Any, cumulative: bool) -> None:
        self.prompt = output.prompt_token_ids or self.prompt
        self.cached = output.num_cached_tokens or self.cached
        for choice in output.outputs:
            known = self.tokens.setdefault(choice.index, [])
            if cumulative:
                known[:] = choice.token_ids
            else:
                known.extend(choice.token_ids)


# Results by ticket: (order in which the prompts were submitted, results of that prompt's children).
_tickets: dict[str, list[list[ChoiceResult] | None]] = {}


def open_ticket() -> str:
    """A new ticket, to be put into ``extra_args`` and taken or discarded afterwards."""
    ticket = uuid.uuid4().hex
    _tickets[ticket] = []
    return ticket


def take(ticket: str) -> list[ChoiceResult]:
    """A finished HTTP request's results in the order of its choices; forgets the ticket."""
    prompts = _tickets.pop(ticket, [])
    return [result for results in prompts for result in results or ()]


def discard(ticket: str) -> None:
    """Forget a ticket whose request failed or whose client left."""
    _tickets.pop(ticket, None)


def wants_collection(params: Any) -> bool:
    """Whether a request's parameters carry a ticket."""
    return bool(params.extra_args and params.extra_args.get(TICKET))


async def collect(
    engine: Any, outputs: AsyncGenerator[Any, None], params: Any, request_id: str
) -> AsyncGenerator[Any, None]:
    """Pass ``outputs`` on; when they end, fetch the records and lay them under the ticket.

    Where the caller leaves earlier, or the request fails, they are fetched for nobody, so that the
    workers forget them.
    """
    from vllm.sampling_params import RequestOutputKind

    ticket: str = params.extra_args[TICKET]
    key = result_key(ticket, request_id)
    prompts = _tickets.setdefault(ticket, [])
    place = len(prompts)
    prompts.append(None)
    tracker = _Tracker()
    cumulative = params.output_kind != RequestOutputKind.DELTA
    fetched = False
    try:
        async for output in outputs:
            tracker.see(output, cumulative)
            yield output
        summaries = await _fetch(engine, key, _limits(tracker))
        fetched = True
    finally:
        await outputs.aclose()
        if not fetched:  # the engine has been told to abort it, so nothing is recorded after this
            forgetting = asyncio.ensure_future(_forget(engine, key, params.n))
            _forgetting.add(forgetting)
            forgetting.add_done_callback(_forgetting.discard)
    # A long read is a second of work, in which others' tokens go on.
    await asyncio.to_thread(_unpack_reads, summaries)
    spec = catalog_for(engine.vllm_config).parse(params.extra_args[FIELD])
    prompts[place] = _choices(spec, tracker, summaries, engine.get_tokenizer())


# Kept here, since the event loop alone lets a task be collected.
_forgetting: set[asyncio.Future[None]] = set()


async def _forget(engine: Any, key: str, children: int) -> None:
    """Have every worker forget a request's records."""
    with contextlib.suppress(Exception):  # an engine that has ended has forgotten everything
        await _fetch(engine, key, dict.fromkeys(range(children), 0))


async def _fetch(engine: Any, key: str, limits: dict[int, int]) -> list[dict[str, Any]]:
    """The workers' records of a request, from whichever engines served it.

    An engine that has ended never answers, and vLLM does not end the wait: with several engines
    the others are enough where they have every child, and with none left there is no answer.

    Raises:
        vllm.v1.engine.exceptions.EngineDeadError: where the records are lost.
    """
    client = engine.engine_core
    waiting = {
        asyncio.ensure_future(client._call_utility_async(TAKE, key, limits, engine=one))
        for one in client.core_engines
    }
    summaries: list[dict[str, Any]] = []
    try:
        while waiting and {summary["child"] for summary in summaries} < limits.keys():
            done, waiting = await asyncio.wait(
                waiting, timeout=LIVENESS_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            for call in done:
                summaries += [s for worker in call.result() for s in worker or ()]
            if waiting and not done and engine.errored:
                raise engine.dead_error
    finally:
        for call in waiting:
            call.cancel()
    return summaries


def results_of(llm: Any, output: Any, params: Any) -> list[ChoiceResult]:
    """Offline use: what steering did to one ``RequestOutput`` of ``LLM.generate``.

    Args:
        llm: the ``vllm.LLM`` that made ``output``.
        output: a finished output of a request that asked for ``report`` or ``read``.
        params: the ``SamplingParams`` it was made with.

    Returns:
        One result for each of the output's choices; fetching forgets them.

    Raises:
        LookupError: there is none (any more). Results that nobody fetches are forgotten, the oldest
            first, once there are 4,096 of them or 256 MiB.
    """
    engine = llm.llm_engine
    tracker = _Tracker()
    tracker.see(output, cumulative=True)
    workers = llm.collective_rpc(TAKE, args=(output.request_id, _limits(tracker)))
    summaries = [s for worker in workers for s in worker or ()]
    _unpack_reads(summaries)
    catalog = catalog_for(engine.vllm_config)
    spec = catalog.parse(params.extra_args[FIELD])
    return _choices(spec, tracker, summaries, llm.get_tokenizer())


def _limits(tracker: _Tracker) -> dict[int, int]:
    """Positions that entered the model for good: the last sampled token never does."""
    return {
        child: len(tracker.prompt) + max(len(tokens) - 1, 0)
        for child, tokens in tracker.tokens.items()
    }


def _choices(
    spec: SteeringSpec,
    tracker: _Tracker,
    summaries: Iterable[dict[str, Any]],
    tokenizer: Any,
) -> list[ChoiceResult]:
    by_child: dict[int, list[dict[str, Any]]] = {}
    for summary in summaries:
        by_child.setdefault(summary["child"], []).append(summary)
    results = []
    for child in sorted(tracker.tokens):
        its = by_child.get(child, [])
        if tracker.tokens[child] and not its:
            raise LookupError(
                f"nothing is recorded of choice {child}: it asked for neither report nor read, was "
                f"fetched before, or {MAX_FINISHED_RECORDS} other requests have ended since"
            )
        results.append(
            ChoiceResult(
                interventions=_interventions(spec, its),
                read=_read(spec, tracker.prompt, tracker.tokens[child], its, tokenizer),
                tokens_cached=_cached(tracker, its),
                aggregate=_first(its, "aggregate"),
                measured=_measured(its),
            )
        )
    return results


def _unpack_reads(summaries: Iterable[dict[str, Any]]) -> None:
    for summary in summaries:
        if summary["read"] is not None:
            summary["read"] = list(features_read(summary["read"]))


def _cached(tracker: _Tracker, summaries: Sequence[dict[str, Any]]) -> int:
    """Prompt tokens served from the prefix cache, of one child.

    vLLM tells one number for all children of a request, and none again after a preemption.
    """
    cached = _first(summaries, "cached")
    return tracker.cached if cached is None else int(cached)


def _interventions(spec: SteeringSpec, summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The report's entries; each pipeline stage knows the edits at its own layers."""
    nothing = {
        "tokens_edited": 0,
        "tokens_skipped": 0,
        "tokens_active": 0,
        "mean_activation": None,
        "max_activation": None,
    }
    entries = []
    for i, edit in enumerate(spec.edits):
        counts = next(
            (s["edits"][i] for s in summaries if s["edits"] and s["edits"][i] is not None), nothing
        )
        entries.append(
            {
                "sae": edit.sae,
                "feature": edit.feature,
                "op": edit.op,
                "value": edit.value,
                "effective_value": edit.effective_value,
                **counts,
            }
        )
    return entries


def _read(
    spec: SteeringSpec,
    prompt: Sequence[int],
    generated: Sequence[int],
    summaries: Sequence[dict[str, Any]],
    tokenizer: Any,
) -> dict[str, Any] | None:
    if spec.read is None:
        return None
    ids = [*prompt, *generated]
    tokens = [
        {
            "position": position,
            "id": ids[position],
            "text": tokenizer.decode([ids[position]]),
            "phase": "prompt" if position < len(prompt) else "generation",
            "features": features,
        }
        for position, features in _first(summaries, "read") or ()
    ]
    return {"sae": spec.read.sae, "tokens": tokens}


def _measured(summaries: Sequence[dict[str, Any]]) -> Measured | None:
    found = _first(summaries, "measured")
    return None if found is None else Measured(**found)


def _first(summaries: Sequence[dict[str, Any]], key: str) -> Any:
    return next((s[key] for s in summaries if s[key] is not None), None)


@dataclass
class WorkerStats:
    """Gauges, and counters since the last call by anyone, summed over data-parallel engines."""

    slots_in_use: int = 0
    slots_capacity: int = 0
    rows_in_use: int = 0
    rows_capacity: int = 0
    results_held: int = 0
    edited_tokens: int = 0
    skipped_tokens: int = 0
    op_seconds: float = 0.0


async def worker_stats(engine: Any) -> WorkerStats:
    """Ask every engine's first worker how steering is doing."""
    per_engine = await engine.engine_core.call_utility_all_async(
        "collective_rpc", "steering_take_stats", None, (), None
    )
    total = WorkerStats()
    for workers in per_engine:
        for stats in workers:
            for name, value in (stats or {}).items():
                setattr(total, name, getattr(total, name) + value)
    return total
