"""What became of an SAE's features between two runs of a text, unsteered and steered."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from sae.arrays import DoubleArray
from steering.request.accepted import Accepted
from steering.request.catalog import Catalog
from steering.request.probe import COMPLETION_TOKENS, KeepStream, Tokens
from steering.request.spec import SteeringSpec
from steering.studies.kept_runs import UNSTEERED, Held, KeptRun, in_groups
from steering.studies.study import Reader
from steering.vllm.reader import Text

#: Tokens that one call of the workers compares: served traffic waits behind it.
MAX_CALL_TOKENS: Final = 2**10


@dataclass(frozen=True)
class Changes:
    """One SAE's features, summed over the tokens that were compared.

    Attributes:
        sae: name of the SAE.
        edited: its features that were edited.
        tokens: how many tokens there are.
        before: ``[d_sae]`` activations in the unsteered run.
        after: ``[d_sae]`` activations in the steered one, behind the edits.
        newly_active: how often a feature that is not edited fires in the steered run alone.
        silenced: how often one fires in the unsteered run alone.
        others: squared norm of the change of the features that are not edited.
        asked: squared norm of the change that the edits of this SAE ask for, f' - f.
        stream: squared norm of the stream's change; None if it is not read where it is written.
        unexplained: of that less the decoded change of all features.
    """

    sae: str
    edited: tuple[int, ...]
    tokens: int
    before: DoubleArray
    after: DoubleArray
    newly_active: int = 0
    silenced: int = 0
    others: float = 0.0
    asked: float = 0.0
    stream: float | None = None
    unexplained: float | None = None

    @classmethod
    def none(cls, sae: str, edited: tuple[int, ...], d_sae: int) -> Changes:
        """Of no token."""
        return cls(sae, edited, 0, np.zeros(d_sae), np.zeros(d_sae))

    def plus(self, figures: Mapping[str, Any]) -> Changes:
        """With what `steering.worker.changes.compare` found of further tokens."""
        latents = np.frombuffer(figures["latents"], np.int32)

        def dense(name: str) -> DoubleArray:
            found = np.zeros(len(self.before))
            found[latents] = np.frombuffer(figures[name], np.float64)
            return found

        return self + Changes(
            self.sae,
            self.edited,
            figures["tokens"],
            dense("before"),
            dense("after"),
            figures["newly_active"],
            figures["silenced"],
            figures["others"],
            figures["asked"],
            figures["stream"],
            figures["unexplained"],
        )

    def __add__(self, other: Changes) -> Changes:
        """Of the tokens of both."""
        return Changes(
            self.sae,
            self.edited,
            self.tokens + other.tokens,
            self.before + other.before,
            self.after + other.after,
            self.newly_active + other.newly_active,
            self.silenced + other.silenced,
            self.others + other.others,
            self.asked + other.asked,
            _sum(self.stream, other.stream),
            _sum(self.unexplained, other.unexplained),
        )

    def to_json(self, top_k: int, label: Callable[[int], str | None]) -> dict[str, Any]:
        """An entry of an evaluation's ``features``; figures that are not defined are null.

        Args:
            top_k: most features of ``moved``, which has only such as moved.
            label: of a feature.
        """
        n = max(self.tokens, 1)
        before, after = self.before / n, self.after / n
        return {
            "sae": self.sae,
            "edited": [
                {"feature": i, "before": float(before[i]), "after": float(after[i])}
                for i in self.edited
            ],
            "moved": [
                {
                    "feature": i,
                    "label": label(i),
                    "before": float(before[i]),
                    "after": float(after[i]),
                }
                for i in self._moved(top_k)
            ],
            "newly_active": self.newly_active / n,
            "silenced": self.silenced / n,
            "leak": self._leak(),
            "explained": self._explained(),
        }

    def _moved(self, top_k: int) -> list[int]:
        """The features that are not edited by the size of their change, ties by lower index."""
        size = np.abs(self.after - self.before)
        size[list(self.edited)] = 0
        best = np.argsort(-size, kind="stable")[:top_k]
        return [int(i) for i in best if size[i] > 0]

    def _leak(self) -> float | None:
        return _ratio(math.sqrt(self.others), math.sqrt(self.asked)) if self.edited else None

    def _explained(self) -> float | None:
        if self.stream is None or self.unexplained is None:
            return None
        left = _ratio(self.unexplained, self.stream)
        return None if left is None else 1 - left


@dataclass(frozen=True)
class Steered:
    """One steered run of a text.

    Attributes:
        text: with the unsteered run's completion; its prompt may differ where only the completion's
            tokens are compared.
        tokens: which of its tokens are compared, as `covered_by` says, say.
        accepted: how it is steered; None for the model as it is.
    """

    text: Text
    tokens: Tokens
    accepted: Accepted | None = None


def covered_by(spec: SteeringSpec | None) -> Tokens:
    """The tokens that some edit covers; the completion's if there is no edit."""
    if spec is None or not spec.edits:
        return COMPLETION_TOKENS
    return tuple(dict.fromkeys(edit.positions for edit in spec.edits))


async def changes(
    reader: Reader,
    catalog: Catalog,
    texts: Iterable[tuple[Text, Sequence[Steered]]],
    saes: Sequence[str],
    *,
    last_enters: bool = False,
) -> AsyncGenerator[tuple[int, int, list[Changes]], None]:
    """Compare the features of steered runs with those of one unsteered run of each text.

    Whoever leaves it early closes it (`contextlib.aclosing`): runs in flight leave the engine, and
    the workers forget what they kept.

    Args:
        reader: runs the texts, and asks the workers.
        catalog: the SAEs.
        texts: each with its steered runs.
        saes: names of the SAEs that are read; one run carries them all. Without any nothing runs.
        last_enters: whether the last token enters the model.

    Yields:
        The places of a text and of one of its steered runs, and the changes at each SAE once, as
        they are known, in no order.

    Raises:
        SteeringError: ``invalid_weights`` if an SAE has some that are not finite; if the engine's
            door refuses a run.
    """
    names = tuple(dict.fromkeys(saes))
    if not names:
        return
    for name in names:
        await catalog.prepare_whole(name)
    made = [
        _Text(place, text, steered, names, last_enters, place % reader.engines)
        for place, (text, steered) in enumerate(texts)
    ]
    of_run = {run.key: one for one in made for run in one.runs}
    async with Held(reader) as held:
        for group in in_groups(run for one in made for run in one.runs):
            async with aclosing(held.each(group)) as finished:
                async for run in finished:
                    one = of_run[run.key]
                    for ready in one.ready(run):
                        found = await _compared(reader, catalog, one, ready, held)
                        yield one.place, one.side(ready), found


@dataclass(eq=False)
class _StreamRun(KeptRun):
    """A run of which the workers keep the stream where SAEs read it.

    Attributes:
        saes: their names.
        tokens: which tokens.
    """

    saes: tuple[str, ...] = ()
    tokens: Tokens = ()

    def carried(self) -> Accepted:
        probes = tuple(KeepStream(sae, self.tokens, self.key) for sae in self.saes)
        return replace(self.accepted or UNSTEERED, probes=probes)

    @property
    def kept(self) -> int:
        """Tokens of which a stream is kept."""
        assert self.report is not None
        return max((probe["kept"] for probe in self.report.probed if probe is not None), default=0)


class _Text:
    """One text's runs, the unsteered one first."""

    def __init__(
        self,
        place: int,
        text: Text,
        steered: Sequence[Steered],
        saes: tuple[str, ...],
        last_enters: bool,
        engine: int,
    ) -> None:
        # What any of them is compared on, so that nothing is missing.
        every = tuple(dict.fromkeys(where for one in steered for where in one.tokens))
        sides = [Steered(text, every), *steered]
        self.place = place
        self.saes = saes
        self.runs = [
            _StreamRun(
                side.text,
                side.accepted,
                start=0,
                rows=len(saes) * side.text.length,
                last_enters=last_enters,
                engine=engine,
                saes=saes,
                tokens=side.tokens,
            )
            for side in sides
        ]
        self.left = len(steered)
        self._known = False
        self._waiting: list[_StreamRun] = []

    def side(self, run: _StreamRun) -> int:
        """Which of the steered runs it is."""
        return self.runs.index(run) - 1

    def ready(self, done: KeptRun) -> list[_StreamRun]:
        """The steered runs that can be compared now that another run is done."""
        if done is self.runs[0]:
            self._known = True
        else:
            assert isinstance(done, _StreamRun)
            self._waiting.append(done)
        if not self._known:
            return []
        ready, self._waiting = self._waiting, []
        return ready


async def _compared(
    reader: Reader, catalog: Catalog, one: _Text, run: _StreamRun, held: Held
) -> list[Changes]:
    """The changes at each SAE; what is not needed any more is forgotten."""
    spec = None if run.accepted is None else run.accepted.spec
    one.left -= 1
    forget = [run.key] if one.left else [run.key, one.runs[0].key]
    index = [catalog.index[name] for name in one.saes]
    found = [Changes.none(name, _edited(spec, name), catalog.card(name).d_sae) for name in one.saes]
    total = run.kept
    for start in range(0, max(total, 1), MAX_CALL_TOKENS):
        stop = start + MAX_CALL_TOKENS
        answers = await reader.ask(
            run.engine,
            "steering_compare_features",
            *(one.runs[0].key, run.key, index, start, stop),
            forget if stop >= total else [],
        )
        if not total:
            break
        for i, of_stages in enumerate(zip(*(a for a in answers if a is not None), strict=True)):
            figures = next((figures for figures in of_stages if figures is not None), None)
            if figures is None or figures["unmatched"]:
                raise RuntimeError("some tokens of a text have no stream: nobody computed them")
            found[i] = found[i].plus(figures)
    held.dropped(run.engine, forget)
    return found


def _edited(spec: SteeringSpec | None, sae: str) -> tuple[int, ...]:
    edits = () if spec is None else spec.edits
    return tuple(dict.fromkeys(edit.feature for edit in edits if edit.sae == sae))


def _sum(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else a + b


def _ratio(part: float, whole: float) -> float | None:
    """None where it is not defined: nothing changed, or a square left its dtype."""
    ratio = part / whole if 0 < whole < math.inf else math.nan
    return ratio if math.isfinite(ratio) else None
