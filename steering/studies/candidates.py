"""Edits that may make wanted completions likelier, found by contrast and by attribution."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Final

import numpy as np

from sae.arrays import DoubleArray
from sae.discovery import strongest
from steering.errors import SteeringError
from steering.request.accepted import Accepted, accept
from steering.request.probe import COMPLETION_TOKENS, EVERY_TOKEN, Pool
from steering.studies.contrast import Contrasted, contrasted
from steering.studies.halves import Half, log_odds
from steering.studies.reading import Pooled, mean_where_it_fires, pooled
from steering.studies.study import Context
from steering.vllm.reader import Text

#: How many features' ablation is tried: those that write most over the texts.
NUM_ATTRIBUTED: Final = 16

#: One intervention of a `steering` object.
Intervention = dict[str, Any]


@dataclass(frozen=True)
class _Pull:
    """A feature, and whether more or less of it is wanted.

    Attributes:
        feature: index of the feature.
        more: whether more of it is wanted; else less.
        activation: its mean activation over the tokens where it fires.
    """

    feature: int
    more: bool
    activation: float

    def intervention(self, sae: str) -> Intervention:
        """The edit that adds or subtracts the activation on every token; its strength is searched.

        An edit that changes the feature only where it fires would cost nothing on texts where it
        never does, so no budget would bound it.
        """
        value = self.activation if self.more else -self.activation
        return {"sae": sae, "feature": self.feature, "op": "add", "value": value}


async def candidates(
    context: Context, sae: str, half: Half, paths: Sequence[str], number: int, attributed: int
) -> list[Intervention]:
    """Edits to try, the most promising first.

    Args:
        context: the study's context.
        sae: name of the SAE.
        half: the texts that the edit is fitted on.
        paths: the paths of these texts in the body, the positive ones' first.
        number: how many edits, at most.
        attributed: how many features' ablation is tried.

    Raises:
        SteeringError: ``invalid_value`` if no token of a text takes part; ``invalid_weights`` if
            the SAE has weights that are not finite.
    """
    pool = Pool(sae, COMPLETION_TOKENS, "mean")
    context.progress.expect(2 * len(half.texts))
    read = await contrasted(
        context, pool, half.positive, half.negative, paths, context.progress.step
    )
    pulls = [
        list(await asyncio.to_thread(_parting, context, sae, read, number, more))
        for more in (True, False)
    ]
    pulls.append(await _carrying(context, sae, half, attributed))
    # The lists take turns; each feature comes once.
    found: dict[int, _Pull] = {}
    for pull in chain.from_iterable(zip_longest(*pulls)):
        if pull is not None:
            found.setdefault(pull.feature, pull)
    return [pull.intervention(sae) for pull in found.values()][:number]


def _parting(
    context: Context, sae: str, read: Contrasted, number: int, more: bool
) -> Iterator[_Pull]:
    """Features that are larger in the texts of one side, by AUROC, ties by what they write."""
    figures = read.figures
    written = figures.difference * _norms(context, sae)
    score = figures.auroc - 0.5 if more else 0.5 - figures.auroc
    score = np.where(score > 0, score, np.nan)
    side = read.positive if more else read.negative
    activation = mean_where_it_fires(side)
    for feature in strongest(score, written, number).tolist():
        if activation[feature] > 0:
            yield _Pull(feature, more, float(activation[feature]))


async def _carrying(context: Context, sae: str, half: Half, number: int) -> list[_Pull]:
    """Features on which `log_odds` rest, by the size of what their ablation does to them."""
    entering = [Text(text.prompt, text.completion[:-1]) for text in half.texts]
    pool = Pool(sae, EVERY_TOKEN, "max", scaled=True)
    read = await pooled(context.reader, context.catalog, entering, pool, done=context.progress.step)
    edits = await asyncio.to_thread(_ablations, context, sae, read, number)
    before, *after = await log_odds(context, half, [None, *edits.values()])
    activation = mean_where_it_fires(read)
    effects = {
        feature: before - odds for feature, odds in zip(edits, after, strict=True) if odds != before
    }
    return [
        _Pull(feature, effects[feature] > 0, float(activation[feature]))
        for feature in sorted(effects, key=lambda i: (-abs(effects[i]), i))
        if activation[feature] > 0
    ]


def _ablations(
    context: Context, sae: str, read: Sequence[Pooled], number: int
) -> dict[int, Accepted]:
    """The ablation of each of the features that write most."""
    total = np.zeros(read[0].d_sae)
    for of_text in read:
        total += of_text.dense(of_text.total)
    written = np.abs(total) * _norms(context, sae)
    written = np.where(written > 0, written, np.nan)
    found = {}
    for feature in strongest(written, written, number).tolist():
        edit = {"sae": sae, "feature": feature, "op": "ablate"}
        try:
            found[feature] = accept({"interventions": [edit]}, context.catalog)
        except SteeringError:
            continue  # its weights are not finite
    return found


def _norms(context: Context, sae: str) -> DoubleArray:
    """``[d_sae]`` norms of what one unit of each feature writes."""
    opened = context.catalog.sae(sae)
    norms = np.empty(opened.card.d_sae, dtype=np.float64)
    for start, stop in opened.chunks(16 * opened.card.d_in):
        norms[start:stop] = opened.written_by(range(start, stop)).norm(dim=1).numpy()
    return norms
