"""How likely texts are, and how far a steered distribution lies from the unsteered one, exactly.

Each side of a comparison is one teacher-forced run. The worker keeps the final hidden states of its
scored positions, and when both sides are there it takes logits of them in blocks and sends back a
few numbers a position: a whole vocabulary never leaves the device.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from sae.arrays import DoubleArray, IntArray
from steering.report import Report
from steering.request.accepted import Accepted
from steering.studies.kept_runs import Calls, Held, KeptRun, in_groups
from steering.studies.study import Reader
from steering.vllm.reader import Text

#: Rows that one call of the workers takes through the head: served traffic waits behind it.
MAX_CALL_ROWS: Final = 2**11
#: Most steered sides, or texts, that one call of the workers is about.
MAX_CALL_SIDES: Final = 128


@dataclass(frozen=True)
class Side:
    """One text of a comparison, steered or not.

    Attributes:
        prompt: token ids.
        completion: token ids, which are generation to edits. They are what is scored; if there are
            none, every token after the first is.
        accepted: how it is steered; None, or without edits, for the model as it is.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...] = ()
    accepted: Accepted | None = None

    @property
    def scored(self) -> tuple[int, ...]:
        """The tokens whose probabilities are asked for."""
        return self.completion or self.prompt[1:]


@dataclass(frozen=True)
class Figures:
    """Of ``n`` scored positions: ``[n]`` and ``[n, w]`` float64, ids and ranks int64.

    Attributes:
        kl: KL(unsteered || steered) of the distributions that predict each, in nats.
        reverse_kl: KL(steered || unsteered).
        unsteered: log p of the actual token; nan where only what follows a text was asked for.
        steered: the same of the steered side.
        top_unsteered: the likeliest token.
        top_steered: the same of the steered side.
        confidence_unsteered: its log p.
        confidence_steered: the same of the steered side.
        watched_unsteered: log p of the watched ids.
        watched_steered: the same of the steered side.
        ranks_steered: how many tokens are strictly likelier than each watched one.
        report: of the steered side's edits; None if it has none, or did not ask.
    """

    kl: DoubleArray
    reverse_kl: DoubleArray
    unsteered: DoubleArray
    steered: DoubleArray
    top_unsteered: IntArray
    top_steered: IntArray
    confidence_unsteered: DoubleArray
    confidence_steered: DoubleArray
    watched_unsteered: DoubleArray
    watched_steered: DoubleArray
    ranks_steered: IntArray
    report: Report | None = None

    @classmethod
    def of(cls, parts: Sequence[dict[str, bytes]], report: Report | None) -> Figures:
        """What `steering.worker.scored_texts.ScoredTexts.compare` says of consecutive rows."""
        columns = {name: _unpacked(name, parts) for name in parts[0]}
        n = len(columns["kl"])
        for name in _WATCHED:
            columns[name] = columns[name].reshape(n, -1)
        return cls(**columns, report=report)


_WATCHED: Final = ("watched_unsteered", "watched_steered", "ranks_steered")
_INT64: Final = frozenset({"top_unsteered", "top_steered", "ranks_steered"})
assert {*_WATCHED, *_INT64} <= {one.name for one in fields(Figures)}


@dataclass(frozen=True)
class Comparison:
    """Steered sides beside one unsteered text.

    Attributes:
        unsteered: as a rule without edits; whatever it is, it is the left side of `Figures.kl`.
        steered: each with the ids that it watches. All have the same scored tokens, but prompts may
            differ.
        after_last: only the distribution after the text's last token, which then enters the model.
    """

    unsteered: Side
    steered: Sequence[tuple[Side, Sequence[int]]]
    after_last: bool = False


class Scorer:
    """Scores texts through a reader.

    Whoever leaves one of its iterators early closes it (`contextlib.aclosing`): runs in flight then
    leave the engine, and the workers forget what they kept.

    Args:
        reader: what runs them, and asks the workers.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._texts = 0

    async def compare(
        self,
        unsteered: Side,
        steered: Iterable[tuple[Side, Sequence[int]]],
        *,
        after_last: bool = False,
    ) -> AsyncGenerator[tuple[int, Figures], None]:
        """Compare steered sides with one unsteered run; see `Comparison`.

        Yields:
            The place of a steered side and its figures, as they are known, in no order.

        Raises:
            SteeringError: if the engine's door refuses a run.
        """
        comparison = Comparison(unsteered, list(steered), after_last)
        async with aclosing(self.compare_all([comparison])) as found:
            async for _, place, figures in found:
                yield place, figures

    async def compare_all(
        self, comparisons: Iterable[Comparison]
    ) -> AsyncGenerator[tuple[int, int, Figures], None]:
        """Make many comparisons; their runs are in flight side by side.

        Yields:
            The places of a comparison and of one of its steered sides, and its figures.

        Raises:
            SteeringError: if the engine's door refuses a run.
        """
        made = [_Pending(place, one, self._next_engine()) for place, one in enumerate(comparisons)]
        pending = {run.key: one for one in made for run in one.runs}
        async with Held(self._reader) as held:
            for group in in_groups(run for one in made for run in one.runs):
                for run in group:
                    pending[run.key].expected += 1
                async with (
                    Calls[list[tuple[int, int, Figures]]]() as calls,
                    aclosing(held.each(group)) as finished,
                ):
                    async for run in finished:
                        of_run = pending[run.key]
                        of_run.take(run)
                        while batch := of_run.ready():
                            calls.begin(self._compared(of_run, batch, held))
                        for found in await calls.answered():
                            for one in found:
                                yield one
                    for found in await calls.answered(every=True):
                        for one in found:
                            yield one

    async def log_probabilities(
        self, sides: Iterable[Side], done: Callable[[], None] | None = None
    ) -> list[DoubleArray]:
        """Log p of each side's scored tokens, unrelated to any other.

        Args:
            sides: any texts.
            done: called for each that is done.

        Returns:
            ``[n]`` of each, in the order of ``sides``.

        Raises:
            SteeringError: if the engine's door refuses a run.
        """
        of_each = list(sides)
        runs = [_kept(side, self._next_engine()) for side in of_each]
        place = {run.key: i for i, run in enumerate(runs)}
        found: dict[str, DoubleArray] = {}

        def put(answers: Iterable[dict[str, DoubleArray]]) -> None:
            for answer in answers:
                found.update(answer)
                if done is not None:
                    for _ in answer:
                        done()

        async with Held(self._reader) as held:
            for group in in_groups(runs):
                async with (
                    Calls[dict[str, DoubleArray]]() as calls,
                    aclosing(held.each(group)) as finished,
                ):
                    async for batch in _batches(finished, len(group)):
                        texts = [(run, of_each[place[run.key]].scored) for run in batch]
                        calls.begin(self._scored(texts, held))
                        put(await calls.answered())
                    put(await calls.answered(every=True))
        return [found[run.key] for run in runs]

    def _next_engine(self) -> int:
        self._texts += 1
        return self._texts % self._reader.engines

    async def _compared(
        self, pending: _Pending, batch: Sequence[KeptRun], held: Held
    ) -> list[tuple[int, int, Figures]]:
        """Figures of steered sides, as `compare_all` yields them.

        What is not needed any more is forgotten.
        """
        unsteered, targets = pending.runs[0], pending.targets
        sides = [[run.key, pending.watched(run)] for run in batch]
        forget = [run.key for run in batch]
        if not pending.left:
            forget.append(unsteered.key)
        step = max(1, MAX_CALL_ROWS // (len(batch) + 1))
        parts: list[list[dict[str, bytes]]] = [[] for _ in batch]
        for start in range(0, unsteered.rows, step):
            stop = min(start + step, unsteered.rows)
            found = await self._ask(
                unsteered.engine,
                "steering_compare",
                *(unsteered.key, sides, targets[start:stop], start, stop),
                forget if stop == unsteered.rows else [],
            )
            for of_side, columns in zip(parts, found, strict=True):
                of_side.append(columns)
        held.dropped(unsteered.engine, forget)
        return [
            (pending.place, pending.side(run), Figures.of(of_side, run.report))
            for run, of_side in zip(batch, parts, strict=True)
        ]

    async def _scored(
        self, texts: Sequence[tuple[KeptRun, tuple[int, ...]]], held: Held
    ) -> dict[str, DoubleArray]:
        """Log p of texts that have run on one engine, by their keys; they are then forgotten."""
        engine = texts[0][0].engine
        longest = max(run.rows for run, _ in texts)
        step = max(1, MAX_CALL_ROWS // len(texts))
        parts: list[list[bytes]] = [[] for _ in texts]
        forget = [run.key for run, _ in texts]
        for start in range(0, longest, step):
            asked = [i for i, (run, _) in enumerate(texts) if run.rows > start]
            rows = slice(start, start + step)
            found = await self._ask(
                engine,
                "steering_log_probabilities",
                [[texts[i][0].key, start, list(texts[i][1][rows])] for i in asked],
                forget if start + step >= longest else [],
            )
            for i, log_p in zip(asked, found, strict=True):
                parts[i].append(log_p)
        held.dropped(engine, forget)
        return {
            run.key: np.frombuffer(b"".join(of_run), np.float32).astype(np.float64)
            for (run, _), of_run in zip(texts, parts, strict=True)
        }

    async def _ask(self, engine: int, method: str, *args: Any) -> list[Any]:
        """The answer of the one worker that has any."""
        answers = await self._reader.ask(engine, method, *args)
        found = next((answer for answer in answers if answer is not None), None)
        if found is None or any(of_text is None for of_text in found):
            raise RuntimeError("some positions of a text have no hidden states: nobody computed it")
        return list(found)


class _Pending:
    """One comparison under way.

    Attributes:
        place: among the others.
        runs: the unsteered one, then the steered ones.
        targets: the actual tokens, or none.
        expected: runs of the group under way that are not done.
        left: steered sides that are not compared yet.
    """

    def __init__(self, place: int, comparison: Comparison, engine: int) -> None:
        unsteered, after_last = comparison.unsteered, comparison.after_last
        for side, _ in comparison.steered:
            assert after_last or side.scored == unsteered.scored, "other tokens than the unsteered"
        sides = [unsteered, *(side for side, _ in comparison.steered)]
        self.place = place
        self.runs = [_kept(side, engine, after_last) for side in sides]
        self.targets = [] if after_last else list(unsteered.scored)
        self.expected = 0
        self.left = len(comparison.steered)
        self._watched = [list(watched) for _, watched in comparison.steered]
        self._place_of = {run.key: i for i, run in enumerate(self.runs)}
        self._known = False
        self._waiting: list[KeptRun] = []

    def side(self, run: KeptRun) -> int:
        """Which of the steered sides a run is."""
        return self._place_of[run.key] - 1

    def watched(self, run: KeptRun) -> list[int]:
        """The ids that a steered run watches."""
        return self._watched[self.side(run)]

    def take(self, run: KeptRun) -> None:
        """A run is done."""
        self.expected -= 1
        if run is self.runs[0]:
            self._known = True
        else:
            self._waiting.append(run)

    def ready(self) -> list[KeptRun]:
        """Steered runs to compare now: many, or all of the group under way."""
        if not self._known or (self.expected and len(self._waiting) < MAX_CALL_SIDES):
            return []
        batch = self._waiting[:MAX_CALL_SIDES]
        self._waiting = self._waiting[MAX_CALL_SIDES:]
        self.left -= len(batch)
        return batch


def _kept(side: Side, engine: int, after_last: bool = False) -> KeptRun:
    length = len(side.prompt) + len(side.completion)
    if after_last:
        start, rows = length - 1, 1
    else:
        start, rows = len(side.prompt) - 1 if side.completion else 0, len(side.scored)
    assert rows > 0, "no token of this text is scored"
    text = Text(side.prompt, side.completion)
    return KeptRun(text, side.accepted, start, rows, last_enters=after_last, engine=engine)


async def _batches(finished: AsyncIterator[KeptRun], expected: int) -> AsyncIterator[list[KeptRun]]:
    """Runs of one engine each, as many as a call of the workers takes."""
    waiting: dict[int, list[KeptRun]] = {}
    async for run in finished:
        expected -= 1
        waiting.setdefault(run.engine, []).append(run)
        for engine, runs in list(waiting.items()):
            full = sum(one.rows for one in runs) >= MAX_CALL_ROWS or len(runs) >= MAX_CALL_SIDES
            if full or not expected:
                yield waiting.pop(engine)


def _unpacked(name: str, parts: Sequence[dict[str, bytes]]) -> Any:
    data = b"".join(part[name] for part in parts)
    if name in _INT64:
        return np.frombuffer(data, np.int64)
    return np.frombuffer(data, np.float32).astype(np.float64)
