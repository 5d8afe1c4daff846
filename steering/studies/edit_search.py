"""The strength that a budget of KL allows an edit, and the best of several edits at theirs."""

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

#: At how many strengths the KL of one edit is measured, at most.
MAX_TRIES: Final = 6
#: At how many of them the effect on the fitted texts is measured, at most.
MAX_FITS: Final = 3
#: Shares of the strength that the budget allows: an edit so much weaker may do as much.
WEAKER: Final = (0.5, 0.25)


@dataclass(frozen=True)
class Priced:
    """An edit within the budget.

    Attributes:
        steering: the edit, as a `steering` object.
        kl: what it costs on the neutral texts, in nats.
        odds: the `log_odds` of the half that is fitted on, steered by it.
    """

    steering: dict[str, Any]
    kl: float
    odds: float

    def to_json(self) -> dict[str, Any]:
        """An entry of a suggestion's ``tried``."""
        return {"steering": self.steering, "kl": finite(self.kl), "fit": finite(self.odds)}


@dataclass
class _Pricing:
    """One edit's search for its strength."""

    steering: dict[str, Any]
    search: BudgetSearch
    costs: dict[float, float]

    @property
    def within(self) -> list[float]:
        """Multipliers worth a look: the one that meets the budget, or else some that cost less."""
        if self.search.found is not None:
            return [self.search.found]
        low = sorted(m for m, cost in self.costs.items() if cost <= self.search.budget)
        return [low[i] for i in sorted({0, len(low) // 2, len(low) - 1})] if low else []


class EditSearch:
    """Tries edits at a budget.

    Args:
        context: the study's context.
        half: the texts that edits are fitted on.
        neutral: the texts on which their cost is measured.
        budget: the KL that they may cost at most, in nats.
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
        """Each edit as strong as the budget allows.

        If no strength that was tried meets the budget, the best of some that cost less is taken.

        Args:
            edits: the interventions of each edit, whose strength is searched.
            max_tries: at how many strengths the KL of each is measured, at most.

        Returns:
            One for each edit, in order; None for an edit that cannot be made, or that was beyond
            the budget at every strength tried.
        """
        pricings = await asyncio.to_thread(lambda: [self._pricing(edit) for edit in edits])
        for _ in range(max_tries):
            asked = [
                (pricing, pricing.search.next()) for pricing in pricings if pricing is not None
            ]
            tries = [
                (pricing, multiplier) for pricing, multiplier in asked if multiplier is not None
            ]
            if not tries:
                break
            costs = await self._costs([scaled(pricing.steering, m) for pricing, m in tries])
            for (pricing, multiplier), cost in zip(tries, costs, strict=True):
                pricing.costs[multiplier] = cost
                pricing.search.put(multiplier, cost)
        return await self._best(pricings)

    async def weaker(self, priced: Priced) -> Priced:
        """The edit, or a weaker one that does at least as much within the budget."""
        steerings = [scaled(priced.steering, multiplier) for multiplier in WEAKER]
        costs = await self._costs(steerings)
        odds = await log_odds(
            self._context, self._half, await asyncio.to_thread(self._accepted, steerings)
        )
        found = [Priced(*each) for each in zip(steerings, costs, odds, strict=True)]
        affordable = [priced, *(each for each in found if each.kl <= self._budget)]
        return max(affordable, key=lambda each: each.odds)

    def _pricing(self, interventions: Sequence[Intervention]) -> _Pricing | None:
        steering = {"interventions": [dict(item) for item in interventions]}
        try:
            lowest, highest = multipliers(accept(steering, self._context.catalog))
        except SteeringError:
            return None  # the weights are not finite, or a value is beyond a request's limits
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
        """Each edit at the strength within the budget that does most."""
        strengths = [
            (place, multiplier, scaled(pricing.steering, multiplier), pricing.costs[multiplier])
            for place, pricing in enumerate(pricings)
            if pricing is not None
            for multiplier in pricing.within
        ]
        accepted = await asyncio.to_thread(self._accepted, [s for _, _, s, _ in strengths])
        odds = await log_odds(self._context, self._half, accepted) if strengths else []
        best: list[Priced | None] = [None] * len(pricings)
        for (place, _, steering, kl), log_odds_of_it in zip(strengths, odds, strict=True):
            known = best[place]
            if np.isfinite(log_odds_of_it) and (known is None or log_odds_of_it > known.odds):
                best[place] = Priced(steering, kl, log_odds_of_it)
        return best
