"""An edit that makes wanted completions likelier than unwanted ones, within a budget of KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictInt,
    StrictStr,
    TypeAdapter,
)

from steering.errors import SteeringError
from steering.request.accepted import accept
from steering.request.shape import Number
from steering.studies.body import StudyBody
from steering.studies.budget_search import MAX_TRIES as ALL_TRIES
from steering.studies.calibrate import DEFAULT_BUDGET, BudgetBody
from steering.studies.candidates import NUM_ATTRIBUTED, Intervention, candidates
from steering.studies.contrast import texts_to_read
from steering.studies.edit_search import MAX_FITS, MAX_TRIES, WEAKER, EditSearch, Priced
from steering.studies.halves import Half, log_odds
from steering.studies.neutral import texts_of_budget
from steering.studies.study import Context
from steering.studies.texts import Texts
from steering.vllm.reader import Text

DEFAULT_MAX_EDITS: Final = 4
MAX_EDITS: Final = 16
#: How many edits are tried alone, at most.
NUM_FIRST: Final = 12
#: How many edits are tried beside those that have been chosen, at most.
NUM_NEXT: Final = 4
#: How many edits are tried in either case, at least.
FEWEST: Final = 2
#: So many tokens of the neutral texts are enough to compare edits; the best is measured on all.
ENOUGH_NEUTRAL: Final = 384

_KL = Annotated[Number, Field(gt=0)]
_KL_ADAPTER: Final = TypeAdapter(_KL)


def _budget(raw: Any) -> BudgetBody:
    """A budget from JSON, in which a number stands for the KL itself."""
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        return BudgetBody(value=_KL_ADAPTER.validate_python(raw))
    return BudgetBody.model_validate(raw)


_Budget = Annotated[BudgetBody, PlainValidator(_budget, json_schema_input_type=BudgetBody | _KL)]


class Body(StudyBody):
    """What is wanted and what is not."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringSuggestionRequest")

    positive: Texts = Field(description="At least two, with completions: what is wanted.")
    negative: Texts = Field(description="At least two, with completions: what is not.")
    sae: StrictStr | None = Field(
        default=None,
        description="The SAE whose features are edited; may be left out when one is loaded.",
    )
    budget: _Budget | None = Field(
        default=None,
        description="What the edit may cost on the neutral texts: a metric, which is kl, and a "
        f"value (default {DEFAULT_BUDGET}), or that value alone.",
    )
    max_edits: Annotated[StrictInt, Field(ge=1, le=MAX_EDITS)] | None = Field(
        default=None, description=f"Edits at most (default {DEFAULT_MAX_EDITS})."
    )
    neutral: Texts | None = Field(
        default=None,
        description="The texts on which the budget holds; left out, a text that ships with the "
        "project.",
    )


class BeforeAfter(BaseModel):
    """Mean log P per token of the positive completions less that of the negative ones, in nats."""

    before: float
    after: float


class Tried(BaseModel):
    """One edit that was tried, at a strength within the budget."""

    steering: dict[str, Any]
    kl: float | None
    fit: float | None = Field(description="What `fit.after` would be with this edit.")


class Answer(BaseModel):
    """The edit, which is null if the best one gains nothing on the half that was held out."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringSuggestion")

    steering: dict[str, Any] | None
    fit: BeforeAfter
    held_out: BeforeAfter
    kl: float
    tried: list[Tried]


@dataclass(frozen=True)
class _Plan:
    """The texts of a suggestion, and how much is tried on them.

    Attributes:
        fit: the texts by which edits are chosen.
        held_out: the texts by which the best edit is judged.
        neutral: the texts on which the budget holds.
        sample: the neutral texts on which edits are compared.
        paths: the paths of the fitted texts in the body.
        first: how many edits are tried alone.
        following: how many edits are tried beside those that have been chosen.
        attributed: how many features' ablation is tried.
        max_edits: how many edits the suggestion may have.
        budget: the KL that it may cost, in nats.
    """

    fit: Half
    held_out: Half
    neutral: Sequence[Text]
    sample: Sequence[Text]
    paths: Sequence[str]
    first: int
    following: int
    attributed: int
    max_edits: int
    budget: float

    @property
    def tokens(self) -> int:
        """How many tokens go through the model at most."""
        fit, sample, neutral = self.fit.length, _length(self.sample), _length(self.neutral)

        def rounds(edits: int) -> int:
            return MAX_TRIES * (edits + 1) * sample + MAX_FITS * edits * fit

        last = 2 * ALL_TRIES * neutral + MAX_FITS * fit
        weaker = (len(WEAKER) + 1) * neutral + len(WEAKER) * fit
        reads = (3 + self.attributed) * fit
        more = (self.max_edits - 1) * rounds(self.following)
        return reads + rounds(self.first) + more + last + weaker + 2 * self.held_out.length


async def suggest(context: Context, asked: Body) -> dict[str, Any]:
    """Answer POST /v1/steering/suggest.

    Raises:
        SteeringError: if the body cannot be answered, with the code and path of what is wrong.
    """
    sae = context.sae(asked.sae, "")
    plan = await _plan(context, asked)
    await context.catalog.prepare_whole(sae, "sae")
    (before,) = await log_odds(context, plan.fit, [None])
    found = await candidates(context, sae, plan.fit, plan.paths, plan.first, plan.attributed)
    best, tried = await _chosen(context, plan, found, before)
    edits = [None] if best is None else [None, accept(best.steering, context.catalog)]
    held_before, *held_after = await log_odds(context, plan.held_out, edits)
    if best is None or not held_after[0] > held_before:
        best, held_after = None, [held_before]
    return {
        "steering": None if best is None else best.steering,
        "fit": {"before": before, "after": before if best is None else best.odds},
        "held_out": {"before": held_before, "after": held_after[0]},
        "kl": 0.0 if best is None else best.kl,
        "tried": [priced.to_json() for priced in tried],
    }


async def _chosen(
    context: Context, plan: _Plan, found: Sequence[Intervention], before: float
) -> tuple[Priced | None, list[Priced]]:
    """The best edit on the fitted half (None if none gains there), and all that were tried."""
    search = EditSearch(context, plan.fit, plan.sample, plan.budget)
    each_alone = await search.price([[intervention] for intervention in found])
    alone = [priced for priced in each_alone if priced is not None]
    alone.sort(key=lambda priced: -priced.odds)
    tried = list(alone)
    best = alone[0] if alone and alone[0].odds > before else None
    while best is not None and len(best.steering["interventions"]) < plan.max_edits:
        others = [priced for priced in alone if not _shares_a_feature(priced, best)]
        joint = await search.price(
            [[*_edits(best), *_edits(priced)] for priced in others[: plan.following]]
        )
        gained = [priced for priced in joint if priced is not None]
        tried += gained
        following = max(gained, key=lambda priced: priced.odds, default=None)
        if following is None or not following.odds > best.odds:
            break
        best = following
    if best is None:
        return None, tried
    # The edit was chosen on a sample of the neutral texts; now it has to meet the budget on all.
    search = EditSearch(context, plan.fit, plan.neutral, plan.budget)
    (exact,) = await search.price([_edits(best)], ALL_TRIES)
    if exact is None:
        return None, tried
    exact = await search.weaker(exact)
    tried.append(exact)
    return (exact if exact.odds > before else None), tried


def _edits(priced: Priced) -> list[Intervention]:
    edits: list[Intervention] = priced.steering["interventions"]
    return edits


def _shares_a_feature(one: Priced, other: Priced) -> bool:
    features = {edit["feature"] for edit in _edits(other)}
    return any(edit["feature"] in features for edit in _edits(one))


async def _plan(context: Context, body: Body) -> _Plan:
    """A plan of as much as the limit of tokens allows.

    Raises:
        SteeringError: ``study_too_large`` if the limit does not allow the least; as
            `texts_to_read` and `texts_of_budget` for the texts, and ``invalid_value`` for fewer
            than two on either side or a budget that is not of KL.
    """
    sides = {}
    for name in ("positive", "negative"):
        given = getattr(body, name)
        if len(given) < 2:
            raise SteeringError(
                "invalid_value", f"{name} needs at least 2 texts: one half is held out", name
            )
        sides[name] = await texts_to_read(context, name, given, "completion")
    neutral = await texts_of_budget(context, body.neutral, "neutral")
    fit, held_out = (Half.of(sides["positive"], sides["negative"], first) for first in (0, 1))
    paths = [f"{name}[{i}]" for name, side in sides.items() for i in range(0, len(side), 2)]
    max_edits = body.max_edits or DEFAULT_MAX_EDITS

    def plan(first: int) -> _Plan:
        share = first / NUM_FIRST
        return _Plan(
            *(fit, held_out, neutral, _sample(neutral), paths),
            first=first,
            following=max(FEWEST, round(NUM_NEXT * share)),
            attributed=max(FEWEST, round(NUM_ATTRIBUTED * share)),
            max_edits=max_edits,
            budget=_value(body.budget),
        )

    affordable = (plan(first) for first in range(NUM_FIRST, FEWEST, -1))
    chosen = next((each for each in affordable if each.tokens <= context.max_tokens), plan(FEWEST))
    context.charge(chosen.tokens)
    return chosen


def _value(budget: BudgetBody | None) -> float:
    if budget is None:
        return DEFAULT_BUDGET
    if budget.metric == "nll":
        raise SteeringError(
            "invalid_value", "the budget of suggest is in kl: leave metric out", "budget.metric"
        )
    return budget.value or DEFAULT_BUDGET


def _sample(neutral: Sequence[Text]) -> list[Text]:
    """Every n-th of the neutral texts, so that they have about `ENOUGH_NEUTRAL` tokens."""
    return list(neutral[:: max(1, round(_length(neutral) / ENOUGH_NEUTRAL))])


def _length(texts: Sequence[Text]) -> int:
    return sum(text.length for text in texts)
