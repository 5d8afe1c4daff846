"""What is compared with what: texts, the runs that they need, and which of those are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from steering.request.accepted import Accepted
from steering.request.probe import Tokens
from steering.studies.changes import covered_by
from steering.studies.kept_runs import KeptRun
from steering.vllm.reader import Text

#: The most steered sides, or texts, that one call of the workers is about.
MAX_CALL_SIDES: Final = 128


@dataclass(frozen=True)
class Side:
    """One text of a comparison, steered or not.

    Attributes:
        prompt: token ids.
        completion: token ids, which count as generated for edits. They are what is scored; if there
            are none, every token after the first is.
        accepted: how it is steered; None, or without edits, for the model as it is.
        saes: the SAEs whose features are compared with the unsteered run's as well, over the tokens
            in ``covered``.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...] = ()
    accepted: Accepted | None = None
    saes: tuple[str, ...] = ()

    @property
    def covered(self) -> Tokens:
        """The tokens over which features are compared; see `covered_by`."""
        return covered_by(None if self.accepted is None else self.accepted.spec)

    @property
    def scored(self) -> tuple[int, ...]:
        """The tokens whose probabilities are asked for."""
        return self.completion or self.prompt[1:]


@dataclass(frozen=True)
class Comparison:
    """Steered sides beside one unsteered text.

    Attributes:
        unsteered: the side that `Figures.kl` has on its left, as a rule without edits.
        steered: the other sides, each with the token ids that it watches. All have the same scored
            tokens, but their prompts may differ.
        after_last: whether only the distribution after the text's last token is compared; that
            token then enters the model.
    """

    unsteered: Side
    steered: Sequence[tuple[Side, Sequence[int]]]
    after_last: bool = False


class Pending:
    """One comparison under way.

    Attributes:
        place: index of the comparison among those made together.
        unsteered: the run with which the others are compared.
        runs: the runs to make: the unsteered one, unless it has run before, then the steered ones.
        stays: whether the unsteered run is still needed when all sides are compared.
        targets: the actual tokens of the scored positions, or none.
        expected: how many runs of the group under way are not done yet.
        left: how many steered sides are not compared yet.

    Args:
        place: see above.
        comparison: what to compare.
        engine: which of the reader's engines runs it.
        known: the unsteered run, if it has run before.
        stays: see above.
    """

    def __init__(
        self,
        place: int,
        comparison: Comparison,
        engine: int,
        known: KeptRun | None = None,
        *,
        stays: bool = False,
    ) -> None:
        unsteered, after_last = comparison.unsteered, comparison.after_last
        for side, _ in comparison.steered:
            assert after_last or side.scored == unsteered.scored, "the sides score other tokens"
        steered = [
            kept_run(side, engine, after_last, side.saes, side.covered)
            for side, _ in comparison.steered
        ]
        self.place = place
        if known is None:
            # All SAEs and tokens on which some side is compared, so that no stream is missing.
            read = [side for side, _ in comparison.steered if side.saes]
            saes = tuple(dict.fromkeys(sae for side in read for sae in side.saes))
            tokens = tuple(dict.fromkeys(window for side in read for window in side.covered))
            self.unsteered = kept_run(unsteered, engine, after_last, saes, tokens)
        else:
            self.unsteered = known
        self.runs = steered if known is not None else [self.unsteered, *steered]
        self.stays = stays
        self.targets = [] if after_last else list(unsteered.scored)
        self.expected = 0
        self.left = len(comparison.steered)
        self._watched = [list(watched) for _, watched in comparison.steered]
        self._place_of = {run.key: i for i, run in enumerate(steered)}
        self._known = known is not None
        self._waiting: list[KeptRun] = []

    def side(self, run: KeptRun) -> int:
        """The index of a run among the steered sides."""
        return self._place_of[run.key]

    def watched(self, run: KeptRun) -> list[int]:
        """The token ids that a steered run watches."""
        return self._watched[self.side(run)]

    def take(self, run: KeptRun) -> None:
        """Take note that a run is done."""
        self.expected -= 1
        if run is self.unsteered:
            self._known = True
        else:
            self._waiting.append(run)

    def ready(self) -> list[KeptRun]:
        """The steered runs to compare now: a full call's, or the last of the group under way."""
        if not self._known or (self.expected and len(self._waiting) < MAX_CALL_SIDES):
            return []
        batch = self._waiting[:MAX_CALL_SIDES]
        self._waiting = self._waiting[MAX_CALL_SIDES:]
        self.left -= len(batch)
        return batch


def kept_run(
    side: Side,
    engine: int,
    after_last: bool = False,
    saes: tuple[str, ...] = (),
    tokens: Tokens = (),
) -> KeptRun:
    """The run of a side.

    Args:
        side: the text, and how it is steered.
        engine: which of the reader's engines runs it.
        after_last: whether only what follows its last token is asked for.
        saes: the SAEs where the stream is kept as well.
        tokens: the tokens whose stream is kept.
    """
    length = len(side.prompt) + len(side.completion)
    if after_last:
        start, rows = length - 1, 1
    else:
        start, rows = len(side.prompt) - 1 if side.completion else 0, len(side.scored)
    assert rows > 0, "no token of this text is scored"
    text = Text(side.prompt, side.completion)
    return KeptRun(
        text,
        side.accepted,
        start,
        rows,
        last_enters=after_last,
        engine=engine,
        saes=saes,
        tokens=tokens,
    )
