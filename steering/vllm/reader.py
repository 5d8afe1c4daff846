"""Runs texts through the engine for inspect, the self-checks and studies.

A text is teacher-forced: all of it is the prompt of one engine request that generates a single
token, but its completion counts as generation for edits, conditions and salt. Served traffic goes
first: few runs of a study are in flight at a time, they give way to it (`giving_way`), and if the
scheduler knows priorities, they have the last one. A run is salted like any other request, so it
shares blocks only with equal requests. It takes none from the cache, so that everything is computed
and counted.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final

from steering.report import Report, Ticket
from steering.request.accepted import Accepted
from steering.vllm.door import carrying, refusal_in
from steering.vllm.giving_way import GivingWay, Turn, seconds_queued
from steering.vllm.results import ask_workers, results_of

#: How many engine requests of one study are in flight at a time.
IN_FLIGHT: Final = 8
#: How many studies may have something kept in the workers at a time.
MAX_KEEPING: Final = 8
#: The last of vLLM's priorities, of which the lowest number comes first.
LAST: Final = 2**31 - 1


@dataclass(frozen=True)
class Text:
    """Token ids of a text; those of the completion count as generation."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """How many tokens prompt and completion have together."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Run:
    """One text's way through the engine.

    Attributes:
        prompt: vLLM's engine input, or `prompt_token_ids` (and a `cache_salt`).
        accepted: how the text is steered and read; None for the model as it is.
        sampling: sampling parameters of vLLM that differ from those of one greedy token, such as
            `prompt_logprobs`.
        lora_request: vLLM's ``LoRARequest``; None for the model itself.
        priority: vLLM's priority; served requests have 0, and runs with `LAST` give way to them.
        engine: which of the reader's engines runs it; None for any.
    """

    prompt: Mapping[str, Any]
    accepted: Accepted | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    lora_request: Any = None
    priority: int = LAST
    engine: int | None = None

    @classmethod
    def of(
        cls,
        text: Text,
        accepted: Accepted | None = None,
        *,
        last_enters: bool = True,
        salt: str | None = None,
        **sampling: Any,
    ) -> Run:
        """A run of a text.

        Args:
            text: at least one token, or two if the last does not enter the model.
            accepted: how the text is steered and read.
            last_enters: whether the last token enters the model. If a text is only read it does; if
                it is scored, the last token is like a last sampled one, which does not.
            salt: keeps the run apart from runs with another one, like a client's `cache_salt`.
            sampling: see `Run.sampling`.
        """
        ids = [*text.prompt, *text.completion]
        if not last_enters:
            ids.pop()
        assert ids, "nothing would enter the model"
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if salt is not None:
            prompt["cache_salt"] = salt
        if accepted is not None and text.completion:
            accepted = replace(accepted, prompt_len=len(text.prompt))
        return cls(prompt, accepted, sampling)

    def params(self, ticket: Ticket | None) -> Any:
        """vLLM's sampling parameters, which carry what was accepted.

        Args:
            ticket: where the run's reports go; None if they are fetched by `results_of`.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            **{
                "max_tokens": 1,
                "temperature": 0.0,
                "detokenize": False,
                "skip_reading_prefix_cache": True,
                **self.sampling,
            }
        )
        if self.accepted is None:
            return params
        if ticket is not None:
            accepted = self.accepted.reporting_to(ticket)
        else:
            accepted = replace(self.accepted, awaited=self.reports)
        return carrying(params, accepted)

    @property
    def reports(self) -> bool:
        """Whether the run has a report of what was edited, read or probed."""
        return self.accepted is not None and self.accepted.reports

    def ticket(self) -> Ticket | None:
        """A ticket for the run's report; None if it has no report."""
        if self.accepted is None or not self.reports:
            return None
        return Ticket(self.accepted.spec.report)


@dataclass(frozen=True)
class Finished:
    """What came of a run.

    Attributes:
        output: vLLM's last `RequestOutput` of the run.
        report: what was edited and read; None if the run did not ask.
    """

    output: Any
    report: Report | None


class Reader:
    """Runs texts through a running `AsyncLLM`.

    Args:
        engine: the `AsyncLLM`.
        in_flight: how many runs of one call are in the engine at a time at most.
        way: how runs and calls give way to served requests; None if they need not.

    Attributes:
        keeping: a context that a study enters for as long as the workers keep something for it.
            Only `MAX_KEEPING` may be in it; others wait.
    """

    def __init__(
        self, engine: Any, in_flight: int = IN_FLIGHT, way: GivingWay | None = None
    ) -> None:
        self._engine = engine
        self._in_flight = in_flight
        self._way = way
        self.keeping = asyncio.Semaphore(MAX_KEEPING)

    @property
    def engines(self) -> int:
        """How many engines this process serves: several with data parallelism."""
        return len(self._engine.engine_core.core_engines)

    @property
    def external_blocks(self) -> bool:
        """Whether a KV connector may bring a text's blocks, though none comes from the cache."""
        return self._engine.vllm_config.kv_transfer_config is not None

    async def ask(self, engine: int, method: str, *args: Any, computes: bool = True) -> list[Any]:
        """Call a method of every worker of one engine; returns what each worker answers.

        Args:
            engine: which of the engines, in ``[0, engines)``.
            method: name of a method of `SteeringWorker`.
            args: its arguments, in plain types.
            computes: whether it may take as long as a step, which waits for it; then it gives way.

        Raises:
            vllm.v1.engine.exceptions.EngineDeadError: if an engine has died.
        """
        way = nullcontext() if self._way is None or not computes else self._way.call()
        async with way:
            return await ask_workers(self._engine, engine, method, args)

    async def run(self, run: Run) -> Finished:
        """Run one text. If this is cancelled, the text's request leaves the engine.

        Raises:
            SteeringError: if the engine's door refuses it.
            vllm.exceptions.RetryableRequestError: if the engine drops it, say to be paused.
        """
        async with self._turn_of(run) as turn:
            return await self._run(run, turn)

    def _turn_of(self, run: Run) -> AbstractAsyncContextManager[Turn | None]:
        if self._way is None or run.priority != LAST:
            return nullcontext()
        return self._way.request(len(run.prompt["prompt_token_ids"]))

    async def _run(self, run: Run, turn: Turn | None) -> Finished:
        ticket = run.ticket()
        prompt = {"type": "token", **run.prompt}
        outputs = self._engine.generate(
            prompt,
            run.params(ticket),
            f"read-{uuid.uuid4().hex}",
            lora_request=run.lora_request,
            priority=run.priority,
            data_parallel_rank=run.engine,
        )
        last = None
        try:
            async for output in outputs:
                last = output
                if turn is not None and output.finished:  # its report is still to be fetched
                    turn.left_engine(seconds_queued(output))
        except Exception as error:
            if refusal := refusal_in(error):
                raise refusal from None
            raise
        finally:
            await outputs.aclose()
        _refuse_aborted(last)
        reports = [] if ticket is None else ticket.reports
        return Finished(last, reports[0] if reports else None)

    async def each(self, runs: Iterable[Run]) -> AsyncGenerator[tuple[int, Finished], None]:
        """Run many texts, and yield each with its place in ``runs`` as it is done.

        Runs are taken from the iterable as there is room for them, and finish in any order. If the
        iterator is closed, if its consumer is cancelled, or if a run fails, those in flight are
        taken out of the engine.
        """
        waiting = enumerate(runs)
        running: dict[asyncio.Task[Finished], int] = {}
        try:
            while True:
                while len(running) < self._in_flight and (taken := next(waiting, None)):
                    place, run = taken
                    running[asyncio.create_task(self.run(run))] = place
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield running.pop(task), task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def all(
        self, runs: Iterable[Run], progress: Callable[[int], None] | None = None
    ) -> list[Finished]:
        """Run many texts; returns what came of each, in their order.

        Args:
            runs: see `each`. What comes of all of them is held at once.
            progress: called after each run with the number of runs that are done.
        """
        found: dict[int, Finished] = {}
        async for place, finished in self.each(runs):
            found[place] = finished
            if progress is not None:
                progress(len(found))
        return [found[place] for place in sorted(found)]


def _refuse_aborted(output: Any) -> None:
    """Raise vLLM's ``RetryableRequestError`` if the engine dropped a text, say to be paused."""
    from vllm.exceptions import RetryableRequestError

    if any(choice.finish_reason == "abort" for choice in output.outputs):
        raise RetryableRequestError("the engine dropped a text before its end: ask again")


class OfflineReader:
    """Runs texts through a `vllm.LLM`, which batches them itself; the same calls as `Reader`'s.

    Args:
        llm: the engine.
        in_flight: how many runs are handed to it at a time at most.

    Attributes:
        keeping: see `Reader`; never waits, since nothing runs beside a study offline.
    """

    def __init__(self, llm: Any, in_flight: int = IN_FLIGHT) -> None:
        self._llm = llm
        self._in_flight = in_flight
        self.keeping = nullcontext()

    @property
    def engines(self) -> int:
        """See `Reader.engines`."""
        return 1

    @property
    def external_blocks(self) -> bool:
        """See `Reader.external_blocks`."""
        return self._llm.llm_engine.vllm_config.kv_transfer_config is not None

    async def ask(self, engine: int, method: str, *args: Any, computes: bool = True) -> list[Any]:
        """Call a method of every worker; returns what each answers. See `Reader.ask`."""
        found: list[Any] = self._llm.collective_rpc(method, args=args)
        return found

    async def run(self, run: Run) -> Finished:
        """Run one text.

        Raises:
            SteeringError: if the engine's door refuses it.
        """
        return run_offline(self._llm, run)

    async def each(self, runs: Iterable[Run]) -> AsyncGenerator[tuple[int, Finished], None]:
        """Run many texts, a batch at a time, and yield each with its place in ``runs``."""
        waiting = iter(runs)
        place = 0
        while batch := list(islice(waiting, self._in_flight)):
            for finished in run_batch(self._llm, batch):
                yield place, finished
                place += 1

    async def all(
        self, runs: Iterable[Run], progress: Callable[[int], None] | None = None
    ) -> list[Finished]:
        """Run many texts; returns what came of each, in their order. See `Reader.all`."""
        found = []
        async for _, finished in self.each(runs):
            found.append(finished)
            if progress is not None:
                progress(len(found))
        return found


def run_offline(llm: Any, run: Run) -> Finished:
    """Run one text through a `vllm.LLM`.

    Raises:
        SteeringError: if the engine's door refuses it.
    """
    (finished,) = run_batch(llm, [run])
    return finished


def run_batch(llm: Any, runs: Sequence[Run]) -> list[Finished]:
    """Run texts through a `vllm.LLM` together; returns what came of each, in their order.

    Raises:
        SteeringError: if the engine's door refuses one of them.
    """
    from vllm import LLM

    params = [run.params(None) for run in runs]
    prompts = [dict(run.prompt) for run in runs]
    # Not `SteeringLLM.generate`, which would fetch the reports, and they can be fetched only once.
    outputs = LLM.generate(
        llm, prompts, params, use_tqdm=False, lora_request=[run.lora_request for run in runs]
    )
    return [
        Finished(output, results_of(llm, output)[0] if run.reports else None)
        for run, output in zip(runs, outputs, strict=True)
    ]
