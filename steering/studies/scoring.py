"""How likely texts are, and how far a steered distribution lies from the unsteered one, exactly.

Each side of a comparison is one teacher-forced run. The worker keeps the final hidden states of its
scored positions. When both sides are there, it computes their logits in blocks and sends back a few
numbers for each position: the logits of a whole vocabulary never leave the device.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

import numpy as np

from sae.arrays import DoubleArray
from steering.request.accepted import Accepted
from steering.request.catalog import Catalog
from steering.studies.changes import Changes, compared_features
from steering.studies.comparison import MAX_CALL_SIDES, Comparison, Pending, Side, kept_run
from steering.studies.figures import Figures
from steering.studies.kept_runs import MAX_HELD_ROWS, Calls, Held, KeptRun, in_groups
from steering.studies.study import Reader

#: How many rows one call of the workers takes through the head; served traffic waits for its end.
MAX_CALL_ROWS: Final = 2**11


class Scorer:
    """Scores texts through a reader.

    Whoever may leave one of its iterators early must close it (`contextlib.aclosing`): runs in
    flight then leave the engine, and the workers forget what they kept.

    Args:
        reader: runs the texts and asks the workers.
        catalog: the SAEs; needed if some side's features are compared.
    """

    def __init__(self, reader: Reader, catalog: Catalog | None = None) -> None:
        self._reader = reader
        self._catalog = catalog
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
            The index of a steered side and its figures, as soon as they are known, in no order.

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
        """Make many comparisons, whose runs are in flight side by side.

        Yields:
            The index of a comparison, the index of one of its steered sides, and that side's
            figures, in no order.

        Raises:
            SteeringError: if the engine's door refuses a run.
        """
        made = [
            Pending(place, comparison, self.next_engine())
            for place, comparison in enumerate(comparisons)
        ]
        async with (
            Held(self._reader) as held,
            aclosing(self.compare_pending(made, held)) as found,
        ):
            async for compared in found:
                yield compared

    async def compare_pending(
        self, made: Sequence[Pending], held: Held
    ) -> AsyncGenerator[tuple[int, int, Figures], None]:
        """Run what comparisons still lack, and make them; yields what `compare_all` does.

        Args:
            made: the comparisons.
            held: what the workers keep for them.

        Raises:
            SteeringError: if the engine's door refuses a run.
        """
        pending = {run.key: comparison for comparison in made for run in comparison.runs}
        for group in in_groups(run for comparison in made for run in comparison.runs):
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
                        for compared in found:
                            yield compared
                for found in await calls.answered(every=True):
                    for compared in found:
                        yield compared

    async def log_probabilities(
        self, sides: Iterable[Side], done: Callable[[], None] | None = None
    ) -> list[DoubleArray]:
        """Log p of each side's scored tokens, in nats; nothing is compared.

        Args:
            sides: any texts, steered or not.
            done: called for each text that is done.

        Returns:
            ``[n]`` float64 for each side, in the order of ``sides``.

        Raises:
            SteeringError: if the engine's door refuses a run.
        """
        of_each = list(sides)
        runs = [kept_run(side, self.next_engine()) for side in of_each]
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

    def next_engine(self) -> int:
        """The index of the engine that runs the next text: the engines take turns."""
        self._texts += 1
        return self._texts % self._reader.engines

    async def _compared(
        self, pending: Pending, batch: Sequence[KeptRun], held: Held
    ) -> list[tuple[int, int, Figures]]:
        """The figures of steered sides, as `compare_all` yields them.

        The workers then forget what is no longer needed.
        """
        unsteered, targets = pending.unsteered, pending.targets
        sides = [[run.key, pending.watched(run)] for run in batch]
        forget = [run.key for run in batch]
        if not pending.left and not pending.stays:
            forget.append(unsteered.key)
        read = [run for run in batch if run.saes]
        step = max(1, MAX_CALL_ROWS // (len(batch) + 1))
        parts: list[list[dict[str, bytes]]] = [[] for _ in batch]
        for start in range(0, unsteered.rows, step):
            stop = min(start + step, unsteered.rows)
            found = await self._ask(
                unsteered.engine,
                "steering_compare",
                *(unsteered.key, sides, targets[start:stop], start, stop),
                forget if stop == unsteered.rows and not read else [],
            )
            for of_side, columns in zip(parts, found, strict=True):
                of_side.append(columns)
        changes: dict[str, tuple[Changes, ...]] = {}
        for run in read:
            assert self._catalog is not None
            changes[run.key] = await compared_features(
                self._reader, self._catalog, unsteered, run, forget if run is read[-1] else []
            )
        held.dropped(unsteered.engine, forget)
        return [
            (
                pending.place,
                pending.side(run),
                Figures.of(of_side, run.report, changes.get(run.key, ())),
            )
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
        """The answer of the one worker that has one.

        Raises:
            RuntimeError: if none has, or if the hidden states of a text are missing.
        """
        answers = await self._reader.ask(engine, method, *args)
        found = next((answer for answer in answers if answer is not None), None)
        if found is None or any(of_text is None for of_text in found):
            raise RuntimeError("the workers lack the hidden states of some positions of a text")
        return list(found)


class Baseline:
    """Unsteered texts whose rows stay in the workers while one edit after another is compared.

    They stay for as long as the `Held` that `compare` is given; a study must not enter another one
    meanwhile. Texts beyond `MAX_HELD_ROWS` rows in all do not stay: they run anew each time.

    Args:
        reader: runs the texts and asks the workers.
        sides: the texts, without edits.
    """

    def __init__(self, reader: Reader, sides: Sequence[Side]) -> None:
        self._scorer = Scorer(reader)
        self._sides = list(sides)
        rows = np.cumsum([len(side.scored) for side in self._sides])
        self._stay: list[bool] = (rows <= MAX_HELD_ROWS).tolist()
        self._known: dict[int, KeptRun] = {}

    def tokens(self, edits: int) -> int:
        """How many tokens go through the model if this many edits are compared one by one."""
        return sum(
            (len(side.prompt) + len(side.completion)) * (edits + (1 if stays else edits))
            for side, stays in zip(self._sides, self._stay, strict=True)
        )

    async def compare(
        self, accepted: Accepted, held: Held
    ) -> AsyncGenerator[tuple[int, Figures], None]:
        """Compare every text with the same text edited; see `Scorer.compare_all`.

        Args:
            accepted: the edit.
            held: what the workers keep; it must be the same for all edits.

        Yields:
            The index of a text and its figures, as soon as they are known, in no order.
        """
        made = []
        for place, side in enumerate(self._sides):
            known = self._known.get(place)
            engine = self._scorer.next_engine() if known is None else known.engine
            comparison = Comparison(side, [(replace(side, accepted=accepted), ())])
            made.append(Pending(place, comparison, engine, known, stays=self._stay[place]))
        async with aclosing(self._scorer.compare_pending(made, held)) as found:
            async for place, _, figures in found:
                yield place, figures
        self._known = {pending.place: pending.unsteered for pending in made if pending.stays}


async def _batches(finished: AsyncIterator[KeptRun], expected: int) -> AsyncIterator[list[KeptRun]]:
    """Batches of finished runs, each of one engine and as large as a call of the workers takes."""
    waiting: dict[int, list[KeptRun]] = {}
    async for run in finished:
        expected -= 1
        waiting.setdefault(run.engine, []).append(run)
        for engine, runs in list(waiting.items()):
            full = sum(run.rows for run in runs) >= MAX_CALL_ROWS or len(runs) >= MAX_CALL_SIDES
            if full or not expected:
                yield waiting.pop(engine)
