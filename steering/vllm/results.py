"""Fetches what the workers recorded of a request, by one RPC, once its outputs have ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from steering.report import (
    STOP_REASON,
    Choice,
    FeaturesAt,
    Report,
    Summary,
    Ticket,
    features_read,
    read_object,
)
from steering.request.accepted import Accepted
from steering.request.spec import Read
from steering.vllm.door import PLAN, accepted_of, result_key
from steering.vllm.drain import ASK, TAKE
from steering.vllm.streamed_reads import Told, open_stream
from steering.worker.record_store import MAX_FINISHED_RECORDS
from steering.worker_stats import WorkerStats

#: Seconds between two checks that the engine that is asked for results still lives.
LIVENESS_SECONDS: Final = 1.0
#: A read of more tokens than this is put into words outside of the event loop.
MANY_TOKENS: Final = 64
#: Attribute of an engine's client: result key of a request under way to the engines that run it.
_ENGINES: Final = "steering_engines"
#: Attribute of an engine's input processor: request id to what was accepted of the request.
_ACCEPTED: Final = "steering_accepted"


@dataclass
class _Tracker:
    """What is known of one engine request from the outputs that have passed by.

    Attributes:
        tokens: index of a choice to its output tokens so far.
        prompt: token ids of vLLM's prompt.
        cached: how many of the prompt's tokens came from the prefix cache.
        stopped: the choices that a ``stop_when`` ended.
        aborted: whether a choice was taken out of the engine.
    """

    tokens: dict[int, list[int]] = field(default_factory=dict)
    prompt: Sequence[int] = ()
    cached: int = 0
    stopped: set[int] = field(default_factory=set)
    aborted: bool = False

    def see(self, output: Any, cumulative: bool) -> None:
        """Take note of a ``RequestOutput``, whose tokens are all so far or only the new ones."""
        self.prompt = output.prompt_token_ids or self.prompt
        self.cached = output.num_cached_tokens or self.cached
        for choice in output.outputs:
            known = self.tokens.setdefault(choice.index, [])
            self.aborted |= choice.finish_reason == "abort"
            if (choice.finish_reason, choice.stop_reason) == ("stop", STOP_REASON):
                self.stopped.add(choice.index)
            if cumulative:
                known[:] = choice.token_ids
            else:
                known.extend(choice.token_ids)

    def choices(self, prompt_len: int | None) -> dict[int, Choice]:
        """The choices by index. Generation begins at ``prompt_len``, or after the whole prompt."""
        where = len(self.prompt) if prompt_len is None else prompt_len
        return {
            child: Choice(self.prompt, tokens, where, self.cached, child in self.stopped)
            for child, tokens in sorted(self.tokens.items())
        }


async def collect(
    engine: Any, outputs: AsyncGenerator[Any, None], params: Any, request_id: str
) -> AsyncGenerator[Any, None]:
    """Pass ``outputs`` on; when they end, fetch the records and put the reports on the ticket.

    If the caller leaves earlier, or the request fails, the records are fetched for nobody, so that
    the workers forget them.

    Args:
        engine: the `AsyncLLM`.
        outputs: what its ``generate`` yields.
        params: the request's ``SamplingParams``, with an `Accepted` that has a ticket.
        request_id: the request's id.

    Raises:
        vllm.exceptions.RetryableRequestError: if the engine was stopped in the middle of the
            request.
        vllm.v1.engine.exceptions.EngineDeadError: if an engine died, and the records with it.
    """
    from vllm.exceptions import RetryableRequestError
    from vllm.sampling_params import RequestOutputKind

    accepted = accepted_of(params)
    assert accepted is not None and accepted.ticket is not None
    key = result_key(accepted, request_id)
    place = accepted.ticket.expect(params.n)
    stream = _Stream.of(accepted, place, key, engine.get_tokenizer().decode)
    tracker = _Tracker()
    cumulative = params.output_kind != RequestOutputKind.DELTA
    fetched = False
    try:
        async for output in outputs:
            tracker.see(output, cumulative)
            if stream is not None:
                await stream.tell(tracker.choices(accepted.prompt_len))
            yield output
        if tracker.aborted and engine.errored:  # the records are gone with the workers
            raise RetryableRequestError("the server is stopping")
        choices = tracker.choices(accepted.prompt_len)
        summaries = await _fetch(engine, key, _limits(choices))
        fetched = True
    finally:
        await outputs.aclose()
        if not fetched:  # the engine has been told to abort it, so nothing is recorded after this
            forgetting = asyncio.ensure_future(_forget(engine, key, params.n))
            _forgetting.add(forgetting)
            forgetting.add_done_callback(_forgetting.discard)
    reads = {}
    for summary in summaries:
        if summary.read is not None:
            # A long read takes a second of work, during which other requests' tokens must go on.
            reads[summary.child] = await asyncio.to_thread(_unpacked, summary.read)
    decode = engine.get_tokenizer().decode
    if stream is not None:
        stream.tell_rest(choices, reads)
    accepted.ticket.put(place, _reports(accepted, choices, summaries, reads, decode))


class _Stream:
    """Puts a read of one engine request on its ticket as the request's outputs pass by."""

    def __init__(self, read: Read, ticket: Ticket, place: int, key: str, decode: Any) -> None:
        self._read = read
        self._ticket = ticket
        self._place = place
        self._decode = decode
        self._arrived = open_stream(key)
        self._told: dict[int, Told] = {}

    @classmethod
    def of(cls, accepted: Accepted, place: int, key: str, decode: Any) -> _Stream | None:
        """The stream of a request's read; None if the request does not stream its read."""
        read = accepted.spec.read
        if read is None or not read.stream:
            return None
        assert accepted.ticket is not None
        return cls(read, accepted.ticket, place, key, decode)

    async def tell(self, choices: dict[int, Choice]) -> None:
        """Put on the ticket what has arrived for tokens that entered the model for good."""
        for child, choice in choices.items():
            found = self._arrived.take(child, choice.entered)
            if len(found) > MANY_TOKENS:
                await asyncio.to_thread(self._put, child, choice, found)
            else:
                self._put(child, choice, found)

    def tell_rest(self, choices: dict[int, Choice], reads: dict[int, Any]) -> None:
        """Put on the ticket what is left of the whole read; normally all of it came before."""
        for child, choice in choices.items():
            self._put(child, choice, reads.get(child, ()))

    def _put(self, child: int, choice: Choice, found: Iterable[FeaturesAt]) -> None:
        untold = self._told.setdefault(child, Told()).untold(found)
        if untold:
            read = read_object(self._read.sae, choice, untold, self._decode)
            self._ticket.put_streamed(self._place, child, read)


# Kept here, since the event loop alone does not keep a task from being garbage-collected.
_forgetting: set[asyncio.Future[None]] = set()


async def _forget(engine: Any, key: str, children: int) -> None:
    """Have every worker forget a request's records."""
    with contextlib.suppress(Exception):  # an engine that has ended has forgotten everything
        await _fetch(engine, key, dict.fromkeys(range(children), 0))


async def _fetch(engine: Any, key: str, limits: dict[int, int]) -> list[Summary]:
    """The workers' summaries of a request, from the engines that ran it.

    If it is not known which engines did, all are asked. An engine that has died never answers, and
    vLLM does not end the wait. So this waits only until there is a summary of every choice, and
    while the client has not reported a dead engine.

    Raises:
        vllm.v1.engine.exceptions.EngineDeadError: if an engine died and the records are lost.
    """
    client = engine.engine_core
    waiting = {
        asyncio.ensure_future(client._call_utility_async(TAKE, key, limits, engine=identity))
        for identity in _engines_of(client, key)
    }
    summaries: list[Summary] = []
    try:
        while waiting and {summary.child for summary in summaries} < limits.keys():
            done, waiting = await asyncio.wait(
                waiting, timeout=LIVENESS_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            for call in done:
                summaries += _summaries(call.result())
            if waiting and not done and engine.errored:
                raise engine.dead_error
    finally:
        for call in waiting:
            call.cancel()
    return summaries


async def ask_workers(engine: Any, index: int, method: str, args: Sequence[Any]) -> list[Any]:
    """Call a method of every worker of one engine, and wait for as long as that engine lives.

    Args:
        engine: the `AsyncLLM`.
        index: which of its engines.
        method: name of the workers' method.
        args: its arguments, in plain types.

    Returns:
        What each worker returned.

    Raises:
        vllm.v1.engine.exceptions.EngineDeadError: if an engine has died.
    """
    client = engine.engine_core
    call = asyncio.ensure_future(
        client._call_utility_async(ASK, method, list(args), engine=client.core_engines[index])
    )
    try:
        while not (await asyncio.wait({call}, timeout=LIVENESS_SECONDS))[0]:
            if engine.errored:
                raise engine.dead_error
    finally:
        call.cancel()
    found: list[Any] = call.result()
    return found


def remember_engines() -> None:
    """Have vLLM's client of several engines note which of them runs a request to be fetched.

    A second call changes nothing.
    """
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    choose = DPLBAsyncMPClient.get_core_engine_for_request
    if not hasattr(choose, _ENGINES):
        DPLBAsyncMPClient.get_core_engine_for_request = _noting(choose)


def _noting(choose: Any) -> Any:
    @functools.wraps(choose)
    def wrapper(self: Any, request: Any) -> Any:
        chosen = choose(self, request)
        params = request.sampling_params
        plan = params.extra_args.get(PLAN) if params is not None and params.extra_args else None
        if plan is not None and plan["awaited"]:
            engines = self.__dict__.setdefault(_ENGINES, {})
            # The children of a request share its key, and each may go to another engine.
            engines.setdefault(plan["key"], set()).add(chosen)
        return chosen

    setattr(wrapper, _ENGINES, True)
    return wrapper


def _engines_of(client: Any, key: str) -> Iterable[Any]:
    """The engines that ran a request, or all engines if that is not known; then forgets it."""
    engines = getattr(client, _ENGINES, {}).pop(key, ())
    # An engine that has been taken away since would never answer.
    known = engines and all(identity in client.core_engines for identity in engines)
    asked: Iterable[Any] = engines if known else client.core_engines
    return asked


def remember_accepted(input_processor: Any, request_id: str, accepted: Accepted) -> None:
    """Keep what `results_of` must know of a request whose reports nobody collects by itself.

    At most as many are kept as workers keep records of ended requests that nobody is sure to fetch.
    """
    if accepted.ticket is not None or not accepted.reports:
        return
    kept: OrderedDict[str, Accepted] = input_processor.__dict__.setdefault(_ACCEPTED, OrderedDict())
    kept[request_id] = accepted
    if not accepted.awaited and len(kept) > MAX_FINISHED_RECORDS:
        kept.popitem(last=False)


def results_of(llm: Any, output: Any, params: object = None) -> list[Report]:
    """For offline use: what steering did to one ``RequestOutput`` of ``LLM.generate``.

    Args:
        llm: the ``vllm.LLM`` that made ``output``.
        output: a finished output of a request that asked for ``report`` or ``read``.
        params: ignored; version 0.1 asked for the ``SamplingParams`` here.

    Returns:
        One report for each of the output's choices. They can be fetched once.

    Raises:
        LookupError: if there is no report, or none any more. Results that nobody fetches are
            forgotten, oldest first, once there are more than 4,096 of them or more than 256 MiB.
    """
    kept = getattr(llm.llm_engine.input_processor, _ACCEPTED, {})
    accepted = kept.pop(output.request_id, None)
    tracker = _Tracker()
    tracker.see(output, cumulative=True)
    if accepted is None:
        raise _nothing_recorded(next(iter(tracker.tokens), 0))
    choices = tracker.choices(accepted.prompt_len)
    key = result_key(accepted, output.request_id)
    summaries = _summaries(llm.collective_rpc(TAKE, args=(key, _limits(choices))))
    reads = {s.child: features_read(s.read) for s in summaries if s.read is not None}
    return _reports(accepted, choices, summaries, reads, llm.get_tokenizer().decode)


def _limits(choices: dict[int, Choice]) -> dict[int, int]:
    return {child: choice.entered for child, choice in choices.items()}


def _summaries(workers: Iterable[Iterable[dict[str, Any]] | None]) -> list[Summary]:
    return [Summary.from_wire(wire) for worker in workers for wire in worker or ()]


def _unpacked(read: Sequence[bytes]) -> list[FeaturesAt]:
    return list(features_read(read))


def _reports(
    accepted: Accepted,
    choices: dict[int, Choice],
    summaries: Sequence[Summary],
    reads: dict[int, Any],
    decode: Any,
) -> list[Report]:
    found = []
    for child, choice in choices.items():
        of_child = [summary for summary in summaries if summary.child == child]
        if choice.generated and not of_child:
            raise _nothing_recorded(child)
        found.append(
            Report.of(
                accepted.spec,
                choice,
                of_child,
                reads.get(child, ()),
                decode,
                accepted.prepared.protected,
            )
        )
    return found


def _nothing_recorded(child: int) -> LookupError:
    return LookupError(
        f"nothing is recorded of choice {child}: its request asked for neither report nor read, "
        f"its results were fetched before, or {MAX_FINISHED_RECORDS} requests have ended since"
    )


async def worker_stats(engine: Any) -> WorkerStats:
    """The sum of `SteeringState.take_stats` over the workers of all engines that keep records."""
    per_engine = await engine.engine_core.call_utility_all_async(
        "collective_rpc", "steering_take_stats", None, (), None
    )
    return WorkerStats.total(stats for workers in per_engine for stats in workers if stats)
