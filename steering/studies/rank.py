"""Which features, each edited alone, most change what the model says after a text."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, StrictInt, StrictStr

from sae.numbers import finite
from steering.errors import SteeringError
from steering.studies.body import StudyBody
from steering.studies.comparison import Side
from steering.studies.figures import Figures
from steering.studies.rank_edits import EditBody, RankEdit, accept_each, covering
from steering.studies.scoring import Scorer
from steering.studies.study import Context
from steering.studies.texts import MAX_TEXTS, StringOrIds, TextBody
from steering.unembedding import Unembedding
from steering.vllm.reader import Text

#: The text if the body has none: Arad et al., "SAEs Are Good for Steering -- If You Select the
#: Right Features" (2505.20063).
PROMPT: Final = "From my experience,"
#: The output score is made of so many tokens that a decoder row promotes most, as in that paper.
NUM_PROMOTED: Final = 20
#: Most characters of targets in one answer, which names all of them with each feature.
MAX_ECHOED: Final = 2**24
#: How many decoder rows are taken through the unembedding at a time.
_ROWS_AT_A_TIME: Final = 256

By = Literal["kl", "output_score", "delta_confidence", "change"]


class Body(StudyBody):
    """The body of a rank."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringRankRequest")

    features: Annotated[list[StrictInt], Strict(), Field(min_length=1)] | None = Field(
        default=None, description="Indices; left out, all features that have a label."
    )
    messages: Annotated[list[dict[Any, Any]], Strict()] | None = Field(
        default=None, description="A conversation, up to its answer. Either this or `prompt`."
    )
    prompt: StringOrIds | None = Field(
        default=None, description=f"A text, or its token ids (default {PROMPT!r})."
    )
    edit: EditBody | None = Field(
        default=None, description="Left out, a clamp to 1.5 times the recorded maximum."
    )
    at: Literal["all", "last"] | None = Field(
        default=None, description="Edit all covered tokens (default), or the text's last."
    )
    by: By | None = Field(default=None, description="The figure that decides (default kl).")
    targets: Annotated[list[StrictStr], Strict(), Field(max_length=MAX_TEXTS)] | None = Field(
        default=None, description="Texts whose first tokens' log-probabilities are compared."
    )


class RankedFeature(BaseModel):
    """What the edit of one feature does to the distribution after the text's last token."""

    feature: int
    label: str | None
    kl: float | None
    output_score: float | None
    delta_confidence: float | None
    targets: dict[str, float | None]


class Answer(BaseModel):
    """The answer of a rank, highest first."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringRanking")

    prompt_token_ids: list[int]
    features: list[RankedFeature]


async def rank(context: Context, sae: str, asked: Body) -> dict[str, Any]:
    """Answer POST /v1/saes/{sae}/rank.

    Raises:
        SteeringError: if the body cannot be answered, with the code and path of what is wrong.
    """
    edit, by = RankEdit.of(asked.edit, last=asked.at == "last"), asked.by or "kl"
    targets = await _targets(context, asked, by)
    paths = _features(context, sae, asked, edit)
    features = list(paths)
    _refuse_echoes(len(features), asked.targets or ())
    text = await _text(context, asked)
    where = "messages" if asked.messages is not None else "prompt"
    context.charge((len(features) + 2) * len(text.prompt), "features" if asked.features else None)
    edits = await asyncio.to_thread(accept_each, context.catalog, sae, edit, paths)
    promoted = await _promoted(context, sae, features, required=by == "output_score")
    edits = await covering(context, sae, text, edit, edits, where)
    watched = [[*ids, *targets.values()] for ids in promoted]
    sides = (
        (Side(text.prompt, (), edited), ids) for edited, ids in zip(edits, watched, strict=True)
    )
    context.progress.expect(len(features))
    found: dict[int, dict[str, Any]] = {}
    compared = Scorer(context.reader).compare(Side(text.prompt), sides, after_last=True)
    vocabulary = context.unembedding()
    async with aclosing(compared):
        async for place, figures in compared:
            found[place] = {
                "feature": features[place],
                "label": context.catalog.features(sae).label(features[place]),
                **_figures(figures, len(promoted[place]), targets, vocabulary),
            }
            context.progress.step()
    return {
        "prompt_token_ids": list(text.prompt),
        "features": _ordered([found[place] for place in sorted(found)], by, targets),
    }


def output_score(ranks: Sequence[int], log_probs: Sequence[float], vocab_size: int) -> float:
    """Arad et al.'s output score of a feature (2505.20063), from the tokens it promotes.

    It is (1 - lowest rank / vocab_size) x largest probability, between 0 and 1.

    Args:
        ranks: each token's rank in the steered distribution: how many tokens are strictly likelier.
        log_probs: each token's log p in the steered distribution, in nats.
        vocab_size: how many tokens the distribution has.
    """
    return (1 - min(ranks) / vocab_size) * math.exp(max(log_probs))


async def _text(context: Context, body: Body) -> Text:
    prompt = PROMPT if body.messages is None and body.prompt is None else body.prompt
    text = TextBody(messages=body.messages, prompt=prompt)
    return await context.tokens(text, "", room=1, answered=True)


def _refuse_echoes(num_features: int, targets: Sequence[str]) -> None:
    """Raise SteeringError if the answer, which names all targets with each feature, gets too long.

    Only a target's first token counts, so a client loses nothing with a shorter one.
    """
    echoed = num_features * sum(map(len, targets))
    if echoed > MAX_ECHOED:
        raise SteeringError(
            "invalid_value",
            f"the answer would have {echoed} characters of targets, the limit is {MAX_ECHOED}: "
            "give fewer targets, or shorter ones, since only the first token of each counts",
            "targets",
        )


async def _targets(context: Context, body: Body, by: str) -> dict[str, int]:
    """The first token of each target."""
    found = {}
    for i, target in enumerate(body.targets or ()):
        ids = await context.encode(target, f"targets[{i}]", special_tokens=False)
        found[target] = ids[0]
    if by == "change" and not found:
        raise SteeringError("invalid_value", "by change needs a target", "targets")
    return found


def _features(context: Context, sae: str, body: Body, edit: RankEdit) -> dict[int, str]:
    """The distinct features, each with its path in the body."""
    table = context.catalog.features(sae)
    if body.features is None:
        labelled = [
            feature
            for feature in table.labelled()
            if edit.unit != "max_act" or (table.max_activation(feature) or 0) > 0
        ]
        if not labelled:
            raise SteeringError(
                "invalid_value",
                f"no feature of SAE {sae!r} has a label"
                + (" and a recorded maximum" if edit.unit == "max_act" else "")
                + ": list features",
                "features",
            )
        return dict.fromkeys(labelled, "features")
    return context.features(sae, body.features, "features")


async def _promoted(
    context: Context, sae: str, features: Sequence[int], *, required: bool
) -> list[list[int]]:
    """The tokens that each decoder row promotes most; none if the model's head is not known."""
    found = await asyncio.to_thread(promoted_tokens, context, sae, features)
    if found is not None:
        return found
    if required:
        raise SteeringError(
            "unsupported_combination",
            "output_score needs the model's output head, and of an SAE of attention's heads their "
            "projection, and the checkpoint does not show them",
            "by",
        )
    return [[] for _ in features]


def promoted_tokens(context: Context, sae: str, features: Sequence[int]) -> list[list[int]] | None:
    """Ids of the `NUM_PROMOTED` tokens that each feature's decoder row promotes most, best first.

    A row that is zero promotes none.

    Args:
        context: the study's context.
        sae: name of the features' SAE.
        features: indices of the features.

    Returns:
        A list for each feature; None if the checkpoint does not show the model's final norm and
        output head or, for an SAE of attention's heads, what the heads write into the stream.
    """
    unembedding = context.unembedding()
    if unembedding is None:
        return None
    opened = context.catalog.sae(sae)
    found: list[list[int]] = []
    for start in range(0, len(features), _ROWS_AT_A_TIME):
        written = opened.written_by(features[start : start + _ROWS_AT_A_TIME])
        rows = unembedding.in_stream(written, opened.card.hook)
        if rows is None:
            return None
        norms = rows.norm(dim=1).tolist()
        ids = unembedding.promoted(rows, NUM_PROMOTED).tolist()
        found += [of_one if norm > 0 else [] for of_one, norm in zip(ids, norms, strict=True)]
    return found


def _figures(
    figures: Figures, num_promoted: int, targets: dict[str, int], vocabulary: Unembedding | None
) -> dict[str, Any]:
    """What one edit does, as the answer has it."""
    score = None
    if num_promoted and vocabulary is not None:
        score = output_score(
            figures.ranks_steered[0, :num_promoted].tolist(),
            figures.watched_steered[0, :num_promoted].tolist(),
            vocabulary.vocab_size,
        )
    changes = (
        figures.watched_steered[0, num_promoted:] - figures.watched_unsteered[0, num_promoted:]
    )
    confidence = figures.confidence_steered[0] - figures.confidence_unsteered[0]
    return {
        "kl": finite(figures.kl[0]),
        "output_score": None if score is None else finite(score),
        "delta_confidence": finite(confidence),
        "targets": {name: finite(change) for name, change in zip(targets, changes, strict=True)},
    }


def _ordered(found: list[dict[str, Any]], by: str, targets: dict[str, int]) -> list[dict[str, Any]]:
    """The entries, highest first; ties by lower index, unknown figures last."""
    first = next(iter(targets), "")

    def key(entry: dict[str, Any]) -> tuple[float, int]:
        figure = entry["targets"][first] if by == "change" else entry[by]
        return (math.inf if figure is None else -figure, entry["feature"])

    return sorted(found, key=key)
