"""Which features tell one set of texts from another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, Strict, StrictInt

from sae.arrays import BoolArray, DoubleArray, FloatArray
from sae.discovery import Contrast as Figures
from sae.discovery import contrast as compared
from sae.discovery import strongest
from sae.features import FeatureTable
from sae.numbers import finite
from steering.errors import SteeringError
from steering.request.probe import (
    COMPLETION_TOKENS,
    EVERY_TOKEN,
    PROMPT_TOKENS,
    Pool,
    Pooling,
)
from steering.request.shape import Number
from steering.studies.body import StudyBody
from steering.studies.reading import Pooled, mean_where_it_fires, pooled
from steering.studies.study import Context
from steering.studies.texts import TextBody, Texts
from steering.vllm.reader import Text

Over = Literal["completion", "prompt", "all"]
By = Literal["auroc", "difference", "d"]

DEFAULT_TOP_K: Final = 20
MAX_TOP_K: Final = 1000
_TOKENS: Final = {"completion": COMPLETION_TOKENS, "prompt": PROMPT_TOKENS, "all": EVERY_TOKEN}
#: Features with a score above this are the positive texts', those below it the negative ones'.
_NEUTRAL: Final[dict[str, float]] = {"auroc": 0.5, "difference": 0.0, "d": 0.0}

_Density = Annotated[list[Annotated[Number, Field(ge=0, le=1)]], Strict(), Field(max_length=2)]


class Body(StudyBody):
    """Two sets of texts, and how they are compared."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringContrastRequest")

    positive: Texts
    negative: Texts
    over: Over | None = Field(
        default=None,
        description="Tokens that take part; left out, the completions' if every text has one, else "
        "the prompts'.",
    )
    pool: Pooling | None = Field(
        default=None, description="How the values of tokens become a text's (default mean)."
    )
    by: By | None = Field(default=None, description="The figure that ranks (default auroc).")
    density: _Density | None = Field(
        default=None,
        description="[low, high]: only features that fire on such a share of tokens, as recorded; "
        "if nothing is recorded, on such a share of the given texts' tokens.",
    )
    top_k: Annotated[StrictInt, Field(ge=1, le=MAX_TOP_K)] | None = Field(
        default=None, description=f"Features of each side (default {DEFAULT_TOP_K})."
    )


class ContrastFeature(BaseModel):
    """A feature that is larger in the texts of one side."""

    feature: int
    label: str | None
    score: float = Field(description="The figure that ranks.")
    auroc: float = Field(
        description="Probability that a positive text has the larger value, ties counted half."
    )
    difference: float = Field(description="mean_positive less mean_negative.")
    d: float | None = Field(description="Cohen's d; null if a side has one text or neither varies.")
    mean_positive: float
    mean_negative: float
    suggested_value: float | None = Field(
        description="The mean activation over the tokens of its side's texts where it fires."
    )


class Answer(BaseModel):
    """The features that best tell two sets of texts apart."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringContrast")

    positive: list[ContrastFeature]
    negative: list[ContrastFeature]


@dataclass(frozen=True)
class Contrasted:
    """Two sets of texts, read and compared.

    Attributes:
        figures: how each feature differs.
        positive: what was read in each positive text.
        negative: what was read in each negative text.
    """

    figures: Figures
    positive: Sequence[Pooled]
    negative: Sequence[Pooled]


async def contrast(context: Context, sae: str, asked: Body) -> dict[str, Any]:
    """Answer POST /v1/saes/{sae}/contrast.

    Raises:
        SteeringError: if the body cannot be answered, with the code and path of what is wrong.
    """
    bounds = _bounds(asked.density)
    texts = {name: getattr(asked, name) for name in ("positive", "negative")}
    over = asked.over or _default_over([*asked.positive, *asked.negative])
    made = {name: await texts_to_read(context, name, given, over) for name, given in texts.items()}
    context.charge(sum(text.length for side in made.values() for text in side))
    context.progress.expect(sum(map(len, made.values())))
    pool = Pool(sae, _TOKENS[over], asked.pool or "mean")
    paths = [f"{name}[{i}]" for name, side in made.items() for i in range(len(side))]
    found = await contrasted(
        context, pool, made["positive"], made["negative"], paths, context.progress.step
    )
    by, top_k = asked.by or "auroc", asked.top_k or DEFAULT_TOP_K
    table = context.catalog.features(sae)
    return await asyncio.to_thread(_answer, found, table, by, bounds, top_k)


async def contrasted(
    context: Context,
    pool: Pool,
    positive: Sequence[Text],
    negative: Sequence[Text],
    paths: Sequence[str],
    done: Callable[[], None] | None = None,
) -> Contrasted:
    """Read two sets of texts and compare every feature's pooled activations.

    Args:
        context: the study's context.
        pool: the SAE, the tokens that take part, and how a text's values become one.
        positive: the texts of the first set, at least one.
        negative: the texts of the second set, at least one.
        paths: the paths of all texts in the body, those of the first set first.
        done: called for each text that is read.

    Raises:
        SteeringError: ``invalid_value`` if no token of a text takes part; ``invalid_weights`` if
            the SAE has weights that are not finite.
    """
    read = await pooled(context.reader, context.catalog, [*positive, *negative], pool, done=done)
    for path, of_text in zip(paths, read, strict=True):
        if of_text.tokens == 0:
            raise _no_token(path)
    first, second = read[: len(positive)], read[len(positive) :]
    figures = await asyncio.to_thread(lambda: compared(_values(first), _values(second)))
    return Contrasted(figures, first, second)


def _no_token(path: str) -> SteeringError:
    return SteeringError(
        "invalid_value",
        "no token of this text takes part: special tokens, its first token and sinks do not",
        path,
    )


def _default_over(texts: Sequence[TextBody]) -> Over:
    return "completion" if all(text.completion is not None for text in texts) else "prompt"


async def texts_to_read(
    context: Context, name: str, texts: Sequence[TextBody], over: Over
) -> list[Text]:
    """The tokens of a list of texts, in each of which some token takes part.

    Args:
        context: the study's context.
        name: name of the list in the body.
        texts: the list.
        over: which tokens take part.

    Raises:
        SteeringError: as `Context.tokens`; ``invalid_value`` if no token of a text takes part, or
            if a completion is needed and missing.
    """
    found = []
    for i, text in enumerate(texts):
        path = f"{name}[{i}]"
        # The last token enters the model, and vLLM always samples one more.
        made = await context.tokens(text, path, room=1)
        if over == "completion" and not made.completion:
            raise SteeringError(
                "invalid_value",
                "with over completion, every text needs a completion",
                f"{path}.completion",
            )
        if not _takes_part(context, made, over):
            raise _no_token(path)
        found.append(made)
    return found


def _takes_part(context: Context, text: Text, over: Over) -> bool:
    """Whether some token may take part; only the engine knows which ones are sinks."""
    special = set(context.catalog.special_token_ids or ())
    ids = [*text.prompt, *text.completion]
    start = len(text.prompt) if over == "completion" else 0
    end = len(text.prompt) if over == "prompt" else len(ids)
    return any(token not in special for token in ids[max(start, 1) : end])


def _bounds(density: Sequence[float] | None) -> tuple[float, float] | None:
    if density is None:
        return None
    if len(density) != 2 or density[0] > density[1]:
        raise SteeringError(
            "invalid_value", "density is [low, high], low not above high", "density"
        )
    return density[0], density[1]


def _values(read: Sequence[Pooled]) -> FloatArray:
    return np.stack([of_text.dense(of_text.pooled).astype(np.float32) for of_text in read])


def _answer(
    found: Contrasted,
    table: FeatureTable,
    by: By,
    bounds: tuple[float, float] | None,
    top_k: int,
) -> dict[str, Any]:
    score = _score(found.figures, by)
    excluded = _excluded(found, table, bounds)
    sides = {}
    for name, sign, read in (("positive", 1, found.positive), ("negative", -1, found.negative)):
        ranked = sign * (score - _NEUTRAL[by])
        ranked[excluded | ~(ranked > 0)] = np.nan
        best = strongest(ranked, found.figures.difference, top_k)
        values = mean_where_it_fires(read)[best]
        sides[name] = [
            _feature(found.figures, table, by, feature, finite(value))
            for feature, value in zip(best.tolist(), values.tolist(), strict=True)
        ]
    return sides


def _score(figures: Figures, by: By) -> DoubleArray:
    """``[d_sae]`` scores, NaN for a feature that has none, as d if the deviations are 0."""
    score: DoubleArray = getattr(figures, by).copy()
    score[~np.isfinite(score)] = np.nan
    return score


def _excluded(
    found: Contrasted, table: FeatureTable, bounds: tuple[float, float] | None
) -> BoolArray:
    """``[d_sae]``: whether a feature is left out because of how often it fires."""
    d_sae = len(found.figures.auroc)
    if bounds is None:
        return np.zeros(d_sae, dtype=np.bool_)
    read = [*found.positive, *found.negative]
    density = np.zeros(d_sae, dtype=np.float64)
    for of_text in read:
        density[of_text.features] += of_text.count
    density /= sum(of_text.tokens for of_text in read)
    for feature in range(d_sae):
        recorded = table.density(feature)
        if recorded is not None:
            density[feature] = recorded
    left_out: BoolArray = ~((density >= bounds[0]) & (density <= bounds[1]))
    return left_out


def _feature(
    figures: Figures, table: FeatureTable, by: By, feature: int, value: float | None
) -> dict[str, Any]:
    return {
        "feature": feature,
        "label": table.label(feature),
        "score": float(_score(figures, by)[feature]),
        "auroc": float(figures.auroc[feature]),
        "difference": float(figures.difference[feature]),
        "d": finite(float(figures.d[feature])),
        "mean_positive": float(figures.mean_first[feature]),
        "mean_negative": float(figures.mean_second[feature]),
        "suggested_value": value,
    }
