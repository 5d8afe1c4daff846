"""Wanted and unwanted completions, and by how much the wanted ones are likelier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steering.request.accepted import Accepted
from steering.studies.comparison import Side
from steering.studies.scoring import Scorer
from steering.studies.study import Context
from steering.vllm.reader import Text


@dataclass(frozen=True)
class Half:
    """Texts with completions, at least one on either side.

    Attributes:
        positive: what is wanted.
        negative: what is not.
    """

    positive: tuple[Text, ...]
    negative: tuple[Text, ...]

    @property
    def texts(self) -> tuple[Text, ...]:
        """All of them, the positive ones first."""
        return self.positive + self.negative

    @property
    def length(self) -> int:
        """How many tokens all of them have."""
        return sum(text.length for text in self.texts)

    @classmethod
    def of(cls, positive: Sequence[Text], negative: Sequence[Text], first: int) -> Half:
        """Every other text on either side, from the index ``first`` on."""
        return cls(tuple(positive[first::2]), tuple(negative[first::2]))


async def log_odds(context: Context, half: Half, edits: Sequence[Accepted | None]) -> list[float]:
    """Mean log P of the positive completions less that of the negative ones, with each edit.

    log P of a completion is the mean over its tokens, in nats. Each text with each edit is a step
    of the study's progress.

    Args:
        context: the study's context.
        half: the texts.
        edits: the edits; None stands for the model as it is.
    """
    texts = half.texts
    context.progress.expect(len(edits) * len(texts))
    sides = [Side(text.prompt, text.completion, edit) for edit in edits for text in texts]
    found = await Scorer(context.reader).log_probabilities(sides, context.progress.step)
    means = np.array([log_p.mean() for log_p in found]).reshape(len(edits), len(texts))
    wanted, unwanted = np.split(means, [len(half.positive)], axis=1)
    odds: list[float] = (wanted.mean(axis=1) - unwanted.mean(axis=1)).tolist()
    return odds
