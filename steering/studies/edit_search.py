"""Edits at the strength that a budget of KL allows, and the best of them by what it does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sae.numbers import finite
from steering.errors import SteeringError
from steering.request.accepted import Accepted, accept
from steering.studies.budget_search import BudgetSearch
from steering.studies.calibrate import multipliers, scaled
from steering.studies.candidates import Intervention
from steering.studies.comparison import Comparison, Side
from steering.studies.halves import Half, log_odds
from steering.studies.scoring import Scorer
from steering.studies.study import Context
from steering.vllm.reader import Text

#: Strengths at which the KL of one edit is measured, at most.
MAX_TRIES: Final = 6
#: Strengths of one edit at which what it does is measured, at most.
MAX_FITS: Final = 3
#: Weaker than the budget allows: what may do as much.
WEAKER: Final = (0.5, 0.25)


@dataclass(frozen=True)
class Priced:
    """An edit within the budget.

    Attributes:
        steering: the edit.
        kl: what it costs on the neutral texts.
        odds: see `log_odds`, of the half that is fitted on.
    """

    steering: dict[str, Any]
    kl: float
    odds: float

    def to_json(self) -> dict[str, Any]:
        return {"steering": self.steering, "kl": finite(self.kl), "fit": finite(self.odds)}


@dataclass
class _Pricing:
    """One edit's search for its strength."""

    steering: dict[str, Any]
    search: BudgetSearch
    costs: dict[float, float]

    @property
    def within(self) -> list[float]:
        """Multipliers worth a look: that which meets the budget, or some of those below it."""
        if self.search.found is not None:
            return [self.search.found]
        low = sorted(m for m, cost in self.costs.items() if cost <= self.search.budget)
        return [low[i] for i in sorted({0, len(low) // 2, len(low) - 1})] if low else []


class EditSearch:
    """Tries edits at a budget.

    Args:
        context: the study's.
        half: the texts that edits are fitted on.
        neutral: the texts on which they cost something.
        budget: KL, the most that they may cost.
    """

    def __init__(
        self, context: Context, half: Half, neutral: Sequence[Text], budget: float
    ) -> None:
        self._context = context
        self._half = half
        self._neutral = neutral
        self._budget = budget

    async def price(
        self, edits: Sequence[Sequence[Intervention]], max_tries: int = MAX_TRIES
    ) -> list[Priced | None]:
        """Each edit at the budget: as strong as that allows, unless a weaker one does more.

        Args:
            edits: each one's interventions, whose strength is looked for.
            max_tries: strengths at which the KL of each is measured.

        Returns:
            None for an edit that cannot be made, or is beyond the budget at each strength tried.
        """
        pricings = await asyncio.to_thread(lambda: [self._pricing(one) for one in edits])
        for _ in range(max_tries):
            asked = [(one, one.search.next()) for one in pricings if one is not None]
            tries = [(one, multiplier) for one, multiplier in asked if multiplier is not None]
            if not tries:
                break
            costs = await self._costs([scaled(one.steering, m) for one, m in tries])
            for (one, multiplier), cost in zip(tries, costs, strict=True):
                one.costs[multiplier] = cost
                one.search.put(multiplier, cost)
        return await self._best(pricings)

    async def weaker(self, priced: Priced) -> Priced:
        """The edit, or a weaker one that does at least as much within the budget."""
        steerings = [scaled(priced.steering, multiplier) for multiplier in WEAKER]
        costs = await self._costs(steerings)
        odds = await log_odds(
            self._context, self._half, await asyncio.to_thread(self._accepted, steerings)
        )
        found = [Priced(*each) for each in zip(steerings, costs, odds, strict=True)]
        affordable = [priced, *(one for one in found if one.kl <= self._budget)]
        return max(affordable, key=lambda one: one.odds)

    def _pricing(self, interventions: Sequence[Intervention]) -> _Pricing | None:
        steering = {"interventions": [dict(one) for one in interventions]}
        try:
            lowest, highest = multipliers(accept(steering, self._context.catalog))
        except SteeringError:
            return None  # its weights are not finite, or its value is beyond a request's limits
        search = BudgetSearch(self._budget, lowest=lowest, highest=highest)
        return _Pricing(steering, search, {})

    async def _costs(self, steerings: Sequence[Mapping[str, Any]]) -> list[float]:
        """Mean KL of each edit over all scored positions of the neutral texts."""
        accepted = await asyncio.to_thread(self._accepted, steerings)
        found: list[list[Any]] = [[] for _ in steerings]
        comparisons = [
            Comparison(
                Side(text.prompt, text.completion),
                [(Side(text.prompt, text.completion, edit), ()) for edit in accepted],
            )
            for text in self._neutral
        ]
        self._context.progress.expect(len(accepted) * len(comparisons))
        scorer = Scorer(self._context.reader)
        async with aclosing(scorer.compare_all(comparisons)) as compared:
            async for _, place, figures in compared:
                found[place].append(figures.kl)
                self._context.progress.step()
        return [float(np.concatenate(kl).mean()) for kl in found]

    def _accepted(self, steerings: Sequence[Mapping[str, Any]]) -> list[Accepted]:
        return [accept(steering, self._context.catalog) for steering in steerings]

    async def _best(self, pricings: Sequence[_Pricing | None]) -> list[Priced | None]:
        """Of each edit the strength within the budget that does most."""
        strengths = [
            (place, multiplier, scaled(one.steering, multiplier), one.costs[multiplier])
            for place, one in enumerate(pricings)
            if one is not None
            for multiplier in one.within
        ]
        accepted = await asyncio.to_thread(self._accepted, [s for _, _, s, _ in strengths])
        odds = await log_odds(self._context, self._half, accepted) if strengths else []
        best: list[Priced | None] = [None] * len(pricings)
        for (place, _, steering, kl), one in zip(strengths, odds, strict=True):
            known = best[place]
            if np.isfinite(one) and (known is None or one > known.odds):
                best[place] = Priced(steering, kl, one)
        return best
