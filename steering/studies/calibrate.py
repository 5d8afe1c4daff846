"""How strong an edit may be within a budget of KL or of negative log-likelihood."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sae.numbers import finite
from steering.errors import BudgetNotMetError, SteeringError
from steering.report import Report
from steering.request.accepted import Accepted
from steering.request.limits import FLOAT32_MAX, VALUE_LIMIT
from steering.request.shape import Number, Shape
from steering.studies.body import SteeringValue, StudyBody
from steering.studies.budget_search import (
    HIGHEST,
    LEAST_SHARE,
    LOWEST,
    MAX_TRIES,
    BudgetSearch,
)
from steering.studies.comparison import Side
from steering.studies.kept_runs import Held
from steering.studies.neutral import texts_of_budget
from steering.studies.scoring import Baseline
from steering.studies.study import Context
from steering.studies.texts import Texts

Metric = Literal["kl", "nll"]
DEFAULT_BUDGET: Final = 0.1
#: The power of the multiplier as which small costs grow.
_POWER: Final[Mapping[str, float]] = {"kl": 2.0, "nll": 1.5}
#: Operations whose value is multiplied. The value of scale moves away from 1; the others stay.
_MULTIPLIED: Final = ("clamp", "add", "floor")


class BudgetBody(Shape):
    """What an edit may cost."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringBudget")

    metric: Metric | None = Field(
        default=None,
        description="kl (default): mean KL of unsteered against steered; nll: the rise of the "
        "mean negative log-likelihood.",
    )
    value: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description=f"Nats a token (default {DEFAULT_BUDGET})."
    )


class Body(StudyBody):
    """The body of a calibration."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringCalibrationRequest")

    steering: SteeringValue = Field(description="The edit, as in a request.")
    budget: BudgetBody | None = Field(default=None, description="KL of 0.1 if left out.")
    texts: Texts | None = Field(
        default=None,
        description="The texts to measure on; left out, a text that ships with the project.",
    )


class CurvePoint(BaseModel):
    """What one multiplier costs."""

    multiplier: float
    kl: float | None
    nll: float | None
    mean_share: float | None


class Answer(BaseModel):
    """The answer of a calibration."""

    model_config: ClassVar[ConfigDict] = ConfigDict(title="SteeringCalibration")

    multiplier: float
    steering: dict[str, Any]
    achieved: float
    curve: list[CurvePoint]


@dataclass(frozen=True)
class Cost:
    """What an edit costs, in means over all scored positions of all texts.

    Attributes:
        kl: KL(unsteered || steered), in nats.
        nll: the rise of the negative log-likelihood, in nats.
        mean_share: see the function `mean_share`.
    """

    kl: float
    nll: float
    mean_share: float | None


async def calibrate(context: Context, asked: Body) -> dict[str, Any]:
    """Answer POST /v1/steering/calibrate.

    Raises:
        BudgetNotMetError: with the curve, if no multiplier that was tried meets the budget.
        SteeringError: if the body cannot be answered, with the code and path of what is wrong.
    """
    accepted = await context.accept(asked.steering, "steering", report=True)
    lowest, highest = multipliers(accepted)
    texts = await texts_of_budget(context, asked.texts, "texts")
    sides = [Side(text.prompt, text.completion) for text in texts]
    baseline = Baseline(context.reader, sides)
    context.charge(baseline.tokens(MAX_TRIES), None if asked.texts is None else "texts")
    metric, value = "kl", DEFAULT_BUDGET
    if asked.budget is not None:
        metric = asked.budget.metric or metric
        value = asked.budget.value or value
    search = BudgetSearch(value, _POWER[metric], lowest, highest)
    curve: dict[float, Cost] = {}
    async with Held(context.reader) as held:
        while (multiplier := search.next()) is not None:
            context.progress.expect(len(texts))
            edit = scaled(asked.steering, multiplier)
            tried = await context.accept(edit, "steering", report=True)
            curve[multiplier] = await _cost(context, baseline, tried, held)
            search.put(multiplier, getattr(curve[multiplier], metric))
    points = [_point(multiplier, curve[multiplier]) for multiplier in sorted(curve)]
    if search.found is None:
        raise BudgetNotMetError(
            f"none of {len(points)} multipliers from {lowest:.4g} to {highest:.4g} costs between "
            f"{LEAST_SHARE * value:.4g} and {value:.4g} nats of {metric}: state another budget or "
            "edit",
            "budget",
            points,
        )
    return {
        "multiplier": search.found,
        "steering": scaled(asked.steering, search.found),
        "achieved": getattr(curve[search.found], metric),
        "curve": points,
    }


def scaled(steering: Mapping[str, Any], multiplier: float) -> dict[str, Any]:
    """A valid `steering` object with its edits ``multiplier`` times as strong.

    Values of clamp, add and floor are multiplied by m, scale becomes 1 + m (v - 1), ablate and cap
    stay.
    """
    interventions = []
    for item in steering["interventions"]:
        if item["op"] in _MULTIPLIED:
            item = {**item, "value": item["value"] * multiplier}
        elif item["op"] == "scale":
            item = {**item, "value": 1 + multiplier * (item["value"] - 1)}
        interventions.append(item)
    return {**steering, "interventions": interventions}


def multipliers(accepted: Accepted) -> tuple[float, float]:
    """The least and the largest multiplier of an edit that can be tried.

    The largest one keeps all values within a request's limits. Both are 1 if the edit's values do
    not change with the multiplier, as a clamp to 0.

    Raises:
        SteeringError: ``unsupported_op`` if it has only operations that no multiplier changes.
    """
    edits = [edit for edit in accepted.spec.edits if edit.op in (*_MULTIPLIED, "scale")]
    if not edits:
        raise SteeringError(
            "unsupported_op",
            "ablate and cap have no strength: calibrate needs an edit that clamps, adds, scales or "
            "has a floor",
            "steering.interventions",
        )
    highest, changes = HIGHEST, False
    for edit in edits:
        size, limit = abs(edit.value), float(VALUE_LIMIT)
        if edit.op == "scale":
            size, limit = abs(edit.value - 1), limit - 1
        if size > 0:
            changes = True
            highest = min(highest, limit / size, FLOAT32_MAX / (abs(edit.effective_value) or 1))
    # Rounded, the limit itself could be exceeded; the edit as it stands never exceeds it.
    if highest < HIGHEST:
        highest = max(highest * (1 - 1e-9), 1.0)
    return (LOWEST, highest) if changes else (1.0, 1.0)


async def _cost(context: Context, baseline: Baseline, accepted: Accepted, held: Held) -> Cost:
    """What an edit with a report costs; each text is a step of the study's progress."""
    kl, rise, reports = [], [], []
    async with aclosing(baseline.compare(accepted, held)) as compared:
        async for _, figures in compared:
            kl.append(figures.kl)
            rise.append(figures.unsteered - figures.steered)
            if figures.report is not None:
                reports.append(figures.report)
            context.progress.step()
    return Cost(
        float(np.concatenate(kl).mean()), float(np.concatenate(rise).mean()), mean_share(reports)
    )


def mean_share(reports: Iterable[Report]) -> float | None:
    """The mean, over edited tokens and hook points, of the change's share of the stream's norm.

    None if no token was edited, or if a stream left its dtype's range, so that its share is not
    known.

    Args:
        reports: one of each text.
    """
    hooks = [hook for report in reports for hook in report.edited or ()]
    edited: int = sum(hook["tokens"] for hook in hooks)
    if not edited or any(hook["mean_share"] is None for hook in hooks):
        return None
    share: float = sum(hook["tokens"] * hook["mean_share"] for hook in hooks)
    return share / edited


def _point(multiplier: float, cost: Cost) -> dict[str, Any]:
    return {
        "multiplier": multiplier,
        "kl": finite(cost.kl),
        "nll": finite(cost.nll),
        "mean_share": cost.mean_share,
    }
