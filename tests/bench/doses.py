"""How strong edits are at a KL: many searched for side by side.

As ``calibrate`` looks for a strength, but the edits of one round share the unsteered run, through
``evaluate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from steering.studies.budget_search import BudgetSearch
from steering.studies.calibrate import scaled
from steering.vllm.offline_studies import OfflineStudies

#: Configurations of one evaluation.
AT_ONCE: Final = 16

Steering = Mapping[str, Any]
Text = Mapping[str, Any]


@dataclass(frozen=True)
class Dose:
    """An edit at its budget.

    Attributes:
        steering: the edit; None if no strength within the search's limits meets the budget.
        kl: what it costs on the texts; None likewise.
        tries: strengths whose KL was measured.
    """

    steering: dict[str, Any] | None
    kl: float | None
    tries: int


def kls(
    studies: OfflineStudies, texts: Sequence[Text], steerings: Sequence[Steering]
) -> list[float]:
    """Mean KL of each edit over all scored positions of the texts."""
    found: list[float] = []
    for start in range(0, len(steerings), AT_ONCE):
        configurations = [
            {"name": str(i), "steering": dict(steering)}
            for i, steering in enumerate(steerings[start : start + AT_ONCE])
        ]
        body = {"texts": list(texts), "configurations": configurations}
        answer = studies.run("evaluate", body)
        # A stream that left its dtype has no KL: too much of it.
        found += [
            float("inf") if one["kl"]["mean"] is None else one["kl"]["mean"]
            for one in answer["configurations"]
        ]
    return found


def doses(
    studies: OfflineStudies,
    texts: Sequence[Text],
    steerings: Sequence[Steering],
    budgets: Sequence[float],
) -> list[Dose]:
    """The strength at which each edit costs its budget: [0.9, 1] of it."""
    searches = [BudgetSearch(budget) for budget in budgets]
    costs: list[dict[float, float]] = [{} for _ in searches]
    while True:
        asked = [(i, search.next()) for i, search in enumerate(searches)]
        tries = [(i, multiplier) for i, multiplier in asked if multiplier is not None]
        if not tries:
            break
        measured = kls(studies, texts, [scaled(steerings[i], m) for i, m in tries])
        for (i, multiplier), kl in zip(tries, measured, strict=True):
            searches[i].put(multiplier, kl)
            costs[i][multiplier] = kl
    made = []
    for steering, search, of_search in zip(steerings, searches, costs, strict=True):
        if search.found is None:
            made.append(Dose(None, None, len(of_search)))
        else:
            found = scaled(steering, search.found)
            made.append(Dose(found, of_search[search.found], len(of_search)))
    return made
