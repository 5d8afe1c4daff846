"""Which features a completion's probability rests on: how much it falls without each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, Strict, StrictInt, TypeAdapter

from sae.numbers import finite
from steering.errors import SteeringError
from steering.request.accepted import Accepted, accept
from steering.request.limits import MAX_INTERVENTIONS, Match
from steering.request.probe import EVERY_TOKEN, Pool
from steering.request.shape_errors import shown
from steering.studies.body import StudyBody
from steering.studies.comparison import Side
from steering.studies.group_search import Members, most_measurements, strongest
from steering.studies.reading import Pooled, pooled
from steering.studies.scoring import Scorer
from steering.studies.study import Context
from steering.studies.texts import StringOrIds, TextBody
from steering.vllm.reader import Text

#: The number of candidates if the body does not say which or how many.
NUM_CANDIDATES: Final = 64

_Listed = Annotated[list[StrictInt], Strict(), Field(min_length=1)]
_LISTED: Final = TypeAdapter(_Listed)
_Number = Annotated[StrictInt, Field(ge=1)]
_NUMBER: Final = TypeAdapter(_Number)


def _candidates(raw: Any) -> list[int] | int:
    return _LISTED.validate_python(raw) if isinstance(raw, list) else _NUMBER.validate_python(raw)


class Body(StudyBody, TextBody):
    """The body of an attribution: a text, and what to look for."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringAttributionRequest")

    completion: StringOrIds | None = Field(default=None, description="What follows; required.")
    span: Annotated[list[StrictInt], Strict()] | None = Field(
        default=None,
        description="[a, b): the completion's tokens whose probability counts (default all).",
    )
    candidates: (
        Annotated[
            list[int] | int, PlainValidator(_candidates, json_schema_input_type=_Number | _Listed)
        ]
        | None
    ) = Field(
        default=None,
        description="Features, or how many of those that write most before the span's last token "
        f"(default {NUM_CANDIDATES}).",
    )
    mode: Literal["ablate", "reread"] | None = Field(
        default=None,
        description="ablate (default); reread: ablate with `match` reread, so that the feature is "
        "silent when the stream is read again.",
    )
    search: Literal["exact", "groups"] | None = Field(
        default=None,
        description="exact (default): measure each candidate; groups: measure groups, and then "
        "only candidates of groups that have an effect.",
    )


class AttributedFeature(BaseModel):
    """How much is lost without one feature, in nats, and its largest activation."""

    feature: int
    label: str | None
    effect: float | None
    activation: float | None


class Answer(BaseModel):
    """The answer of an attribution: features by size of their effect."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringAttribution")

    log_probability: float
    features: list[AttributedFeature]


@dataclass(frozen=True)
class _Study:
    """One attribution under way.

    Attributes:
        context: the study's context.
        sae: name of the SAE.
        text: the text up to the span's end, since nothing after it counts.
        first: index of the span's first token in the completion.
        match: how an ablation is made.
    """

    context: Context
    sae: str
    text: Text
    first: int
    match: Match

    @property
    def entering(self) -> Text:
        """The tokens before the span's last one: those that enter the model."""
        return Text(self.text.prompt, self.text.completion[:-1])

    async def read(self) -> Pooled:
        """What each feature writes over the `entering` tokens, and its largest activation there."""
        pool = Pool(self.sae, EVERY_TOKEN, "max", scaled=True)
        (read,) = await pooled(self.context.reader, self.context.catalog, [self.entering], pool)
        self.context.progress.step()
        return read

    async def log_probabilities(self, edits: Sequence[Accepted | None]) -> list[float]:
        """log P(span) with each edit, in nats; None stands for the model as it is."""
        sides = [Side(self.text.prompt, self.text.completion, edit) for edit in edits]
        scorer = Scorer(self.context.reader)
        found = await scorer.log_probabilities(sides, self.context.progress.step)
        return [float(log_p[self.first :].sum()) for log_p in found]

    def ablation(self, features: Sequence[int]) -> Accepted:
        """The edit that switches these features off. Raises SteeringError if it is refused."""
        edits = [{"sae": self.sae, "feature": feature, "op": "ablate"} for feature in features]
        return accept({"interventions": edits, "match": self.match}, self.context.catalog)

    def ablations(self, groups: Sequence[Members]) -> list[Accepted | None]:
        """Each group's edit; None for a group whose features cannot be switched off together."""
        found: list[Accepted | None] = []
        for group in groups:
            try:
                found.append(self.ablation(group))
            except SteeringError as error:
                if error.code != "ill_conditioned":
                    raise
                found.append(None)
        return found


async def attribute(context: Context, sae: str, asked: Body) -> dict[str, Any]:
    """Answer POST /v1/saes/{sae}/attribute.

    The effect of a feature is log P(span) less log P(span) with the feature ablated.

    Raises:
        SteeringError: if the body cannot be answered, with the code and path of what is wrong.
    """
    study = await _study(context, sae, asked)
    listed = await asyncio.to_thread(_listed, study, asked)
    number = asked.candidates if isinstance(asked.candidates, int) else NUM_CANDIDATES
    runs = min(number, context.catalog.card(sae).d_sae) if listed is None else len(listed)
    if asked.search == "groups":
        runs = most_measurements(runs)
    # Two more runs than candidates: the text as it is, and one in which it is read.
    tokens = (runs + 2) * (study.text.length - 1)
    context.charge(tokens, None if asked.candidates is None else "candidates")
    await context.catalog.prepare_whole(sae)
    context.progress.expect(2)
    (log_p,) = await study.log_probabilities([None])
    read = await study.read()
    weights = await asyncio.to_thread(_written, context, sae, read)
    if listed is None:
        chosen = await asyncio.to_thread(_strongest_writers, study, weights, number)
    else:
        chosen = [feature for feature in listed if feature in weights]
    effects = await _effects(study, log_p, chosen, weights, asked.search or "exact")
    # A feature that never fires is switched off already.
    silent = [] if listed is None else [feature for feature in listed if feature not in weights]
    effects |= dict.fromkeys(silent if read.tokens else (), 0.0)
    activation = read.dense(read.pooled)
    table = context.catalog.features(sae)
    features = [
        {
            "feature": feature,
            "label": table.label(feature),
            "effect": finite(effect),
            "activation": finite(float(activation[feature])),
        }
        for feature, effect in sorted(effects.items(), key=lambda item: (-abs(item[1]), item[0]))
    ]
    return {"log_probability": finite(log_p), "features": features}


async def _effects(
    study: _Study,
    log_p: float,
    chosen: Sequence[int],
    weights: Mapping[int, float],
    search: str,
) -> dict[int, float]:
    """The effect of each candidate that was measured alone."""

    async def measure(groups: Sequence[Members]) -> list[float | None]:
        edits = await asyncio.to_thread(study.ablations, groups)
        runs = [edit for edit in edits if edit is not None]
        study.context.progress.expect(len(runs))
        found = iter(await study.log_probabilities(runs))
        return [None if edit is None else log_p - next(found) for edit in edits]

    if search == "groups" and chosen:
        of_chosen = {feature: weights[feature] for feature in chosen}
        return await strongest(of_chosen, measure, together=MAX_INTERVENTIONS)
    effects = await measure([(feature,) for feature in chosen])
    return {
        feature: effect
        for feature, effect in zip(chosen, effects, strict=True)
        if effect is not None
    }


async def _study(context: Context, sae: str, body: Body) -> _Study:
    if body.completion is None:
        raise SteeringError("invalid_value", "completion is required", "completion")
    tokens = await context.tokens(body, "")
    length = len(tokens.completion)
    span = [0, length] if body.span is None else body.span
    if len(span) != 2 or not 0 <= span[0] < span[1] <= length:
        raise SteeringError(
            "invalid_value",
            f"span {shown(span)} is not [a, b) with 0 <= a < b <= {length}, the completion's "
            "tokens",
            "span",
        )
    match: Match = "reread" if body.mode == "reread" else "delta"
    cut = Text(tokens.prompt, tokens.completion[: span[1]])
    study = _Study(context, sae, cut, span[0], match)
    if match == "reread":
        _refuse_reread(study)
    return study


def _refuse_reread(study: _Study) -> None:
    """Raise SteeringError with the path `mode` if features of this SAE cannot be reread."""
    field = {
        "interventions": [{"sae": study.sae, "feature": 0, "op": "ablate"}],
        "match": study.match,
    }
    try:
        study.context.catalog.parse(field)
    except SteeringError as error:
        raise SteeringError(error.code, error.message, "mode") from None


def _listed(study: _Study, body: Body) -> list[int] | None:
    """The candidates that the body lists, each once; None if it lists none."""
    if not isinstance(body.candidates, list):
        return None
    places = study.context.features(study.sae, body.candidates, "candidates")
    for feature, path in places.items():
        try:
            study.ablation([feature])
        except SteeringError as error:
            raise SteeringError(error.code, error.message, path) from None
    return list(places)


def _written(context: Context, sae: str, read: Pooled) -> dict[int, float]:
    """How much each feature that fires writes: |sum of f x g| x norm of W_dec, by feature."""
    features = read.features.tolist()
    if not features:
        return {}
    written_by = context.catalog.sae(sae).written_by(features)
    norms = written_by.norm(dim=1).numpy().astype(np.float64)
    written = np.abs(read.total) * norms
    return dict(zip(features, written.tolist(), strict=True))


def _strongest_writers(study: _Study, weights: Mapping[int, float], number: int) -> list[int]:
    """The features that write most and can be switched off; ties by lower index."""
    found: list[int] = []
    for feature in sorted(weights, key=lambda i: (-weights[i], i)):
        if len(found) == number:
            break
        if weights[feature] > 0 and study.ablations([(feature,)])[0] is not None:
            found.append(feature)
    return found
