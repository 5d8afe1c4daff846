"""Runs whose hidden states the workers keep until a study has asked about them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from steering.report import Report
from steering.request.accepted import Accepted
from steering.request.catalog import Prepared
from steering.request.keep import Keep
from steering.request.positions import Positions
from steering.request.probe import KeepStream, Tokens
from steering.request.spec import SteeringSpec
from steering.studies.study import Reader
from steering.vllm.reader import Run, Text

T = TypeVar("T")

#: How many rows of hidden states one study has kept at a time; a single text may have more.
MAX_HELD_ROWS: Final = 2**14

#: What a run of the model as it is carries if something is kept of it.
UNSTEERED: Final = Accepted(
    SteeringSpec((), Positions(), error_term=True, report=False, read=None), Prepared({})
)


@dataclass(eq=False)
class KeptRun:
    """A text that is run once while the workers keep rows of hidden states.

    Attributes:
        text: token ids.
        accepted: how it is steered; None, or without edits, for the model as it is.
        start: the first position that is kept.
        rows: how many positions are kept.
        last_enters: see `Run.of`.
        engine: which of the reader's engines runs it; only runs on one engine can be compared.
        key: names what is kept.
        report: the report of its edits once it has run; None if it has none or did not ask.
        saes: the SAEs where the stream is kept as well, as they read it.
        tokens: the tokens whose stream is kept.
    """

    text: Text
    accepted: Accepted | None
    start: int
    rows: int
    last_enters: bool
    engine: int = 0
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    report: Report | None = None
    saes: tuple[str, ...] = ()
    tokens: Tokens = ()

    @property
    def held_rows(self) -> int:
        """How many rows the workers may keep of it, streams included."""
        return self.rows + len(self.saes) * self.text.length

    def carried(self) -> Accepted:
        """How it is steered, with what the workers are to keep of it."""
        accepted = self.accepted
        if accepted is None or not (accepted.spec.edits or accepted.spec.read or accepted.probes):
            accepted = UNSTEERED
        if self.saes:
            probes = tuple(KeepStream(sae, self.tokens, self.key) for sae in self.saes)
            accepted = replace(accepted, probes=probes)
        return replace(accepted, keep=Keep(self.key, self.start, self.start + self.rows))

    def run(self, reader: Reader) -> Run:
        """What the reader is to run."""
        run = Run.of(
            self.text,
            self.carried(),
            last_enters=self.last_enters,
            # Of a block that another engine computed, nothing would be kept here.
            salt=self.key if reader.external_blocks else None,
        )
        return replace(run, engine=self.engine if reader.engines > 1 else None)


def in_groups(runs: Iterable[KeptRun]) -> Iterator[list[KeptRun]]:
    """Groups of consecutive runs, of at most `MAX_HELD_ROWS` rows together, or one run of more."""
    group: list[KeptRun] = []
    rows = 0
    for run in runs:
        if group and rows + run.held_rows > MAX_HELD_ROWS:
            yield group
            group, rows = [], 0
        group.append(run)
        rows += run.held_rows
    if group:
        yield group


class Held:
    """What the workers keep for one study; however it is left, they then forget everything.

    A study must not enter a second one inside the first: it could wait for itself.

    Args:
        reader: runs the texts and asks the workers.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._keys: dict[int, set[str]] = {}

    async def each(self, group: Sequence[KeptRun]) -> AsyncGenerator[KeptRun, None]:
        """Run texts, and yield each run as it is done, in no order."""

        def runs() -> Iterator[Run]:
            for kept in group:
                self._keys.setdefault(kept.engine, set()).add(kept.key)
                yield kept.run(self._reader)

        async with aclosing(self._reader.each(runs())) as finished:
            async for place, of_run in finished:
                group[place].report = of_run.report
                yield group[place]

    def dropped(self, engine: int, keys: Iterable[str]) -> None:
        """Take note that the workers of an engine have forgotten these keys."""
        self._keys[engine].difference_update(keys)

    async def __aenter__(self) -> Self:
        await self._reader.keeping.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._reader.keeping.__aexit__(kind, error, trace)
        # The aborts of runs in flight were sent before, and this call takes the same way.
        for engine, keys in self._keys.items():
            if keys:
                forgetting = asyncio.ensure_future(_forget(self._reader, engine, sorted(keys)))
                _forgetting.add(forgetting)
                forgetting.add_done_callback(_forgetting.discard)


class Calls(Generic[T]):
    """Calls of the workers, under way while further texts run. Leaving it cancels them."""

    def __init__(self) -> None:
        self._begun: set[asyncio.Task[T]] = set()

    def begin(self, call: Coroutine[Any, Any, T]) -> None:
        """Begin one more call."""
        self._begun.add(asyncio.create_task(call))

    async def answered(self, *, every: bool = False) -> list[T]:
        """The answers that have come and were not taken yet; with ``every``, wait for all."""
        if every and self._begun:
            await asyncio.wait(self._begun)
        else:
            await asyncio.sleep(0)
        done = {call for call in self._begun if call.done()}
        self._begun -= done
        return [call.result() for call in done]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for call in self._begun:
            call.cancel()
        await asyncio.gather(*self._begun, return_exceptions=True)


# The event loop holds tasks weakly: without another reference they could be collected.
_forgetting: set[asyncio.Future[None]] = set()


async def _forget(reader: Reader, engine: int, keys: list[str]) -> None:
    with suppress(Exception):  # an engine that has ended has forgotten everything
        await reader.ask(engine, "steering_forget", keys, computes=False)
