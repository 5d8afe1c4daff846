"""How likely texts are, and how far a steered distribution lies from the unsteered one, exactly.

Each side of a comparison is one teacher-forced run. The worker keeps the final hidden states of its
scored positions, and when all are there it takes logits of both sides in blocks and sends back a
few numbers a position: a whole vocabulary never leaves the device.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from sae.arrays import FloatArray, IntArray
from steering.report import Report
from steering.request.accepted import Accepted

if TYPE_CHECKING:
    from steering.vllm.reader import Finished, Run

#: Rows of hidden states that wait in the worker for a comparison that is not complete.
MAX_HELD_ROWS: Final = 8192
#: Rows that one call of the worker takes through the head: served traffic waits behind it.
MAX_CALL_ROWS: Final = 2048
#: Most steered sides, or texts, that one call of the worker is about.
MAX_CALL_SIDES: Final = 128


@dataclass(frozen=True)
class Side:
    """One text of a comparison, steered or not.

    Attributes:
        prompt: token ids.
        completion: token ids, which are generation to edits. They are what is scored; if there are
            none, every token after the first is.
        accepted: how it is steered; None for the model as it is.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...] = ()
    accepted: Accepted | None = None


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
        report: of the steered side's edits; None if it has none.
    """

    kl: FloatArray
    reverse_kl: FloatArray
    unsteered: FloatArray
    steered: FloatArray
    top_unsteered: IntArray
    top_steered: IntArray
    confidence_unsteered: FloatArray
    confidence_steered: FloatArray
    watched_unsteered: FloatArray
    watched_steered: FloatArray
    ranks_steered: IntArray
    report: Report | None = None


class Scorer:
    """Scores texts through a reader.

    Args:
        reader: what runs them, and asks the workers.
    """

    def __init__(self, reader: ScoringReader) -> None:
        self._reader = reader

    def compare(
        self,
        unsteered: Side,
        steered: Iterable[tuple[Side, Sequence[int]]],
        *,
        after_last: bool = False,
    ) -> AsyncIterator[tuple[int, Figures]]:
        """Compare steered sides with one unsteered run.

        Args:
            unsteered: as a rule without edits; whatever it is, it is the left side of `Figures.kl`.
            steered: each with the ids that it watches. They are taken when there is room in the
                engine. All have the same scored tokens; prompts may differ.
            after_last: only the distribution after the text's last token, which then enters the
                model.

        Yields:
            The place of a steered side and its figures, as they are known, in no order. Whoever
            leaves early closes the iterator (`contextlib.aclosing`): runs in flight leave the
            engine, and the workers forget what they kept.

        Raises:
            SteeringError: if the engine's door refuses a run.
        """
        raise NotImplementedError

    async def log_probabilities(self, sides: Iterable[Side]) -> list[FloatArray]:
        """``[n]`` log p of each side's scored tokens, in the order of ``sides``."""
        raise NotImplementedError


class ScoringReader(Protocol):
    """What a `Scorer` needs of a reader."""

    @property
    def engines(self) -> int:
        """How many engines it may choose among."""

    def each(self, runs: Iterable[Run]) -> AsyncIterator[tuple[int, Finished]]:
        """Run texts; what came of each as it is done, with its place."""

    async def ask(self, engine: int, method: str, *args: Any) -> list[Any]:
        """What every worker of one engine answers."""
