"""The search for the strength at which an edit costs what it may."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.studies.budget_search import HIGHEST, LOWEST, MAX_TRIES, BudgetSearch

Curve = Callable[[float], float]


def searched(curve: Curve, budget: float, **arguments: float) -> tuple[float | None, list[float]]:
    """What a search finds on a curve, and the multipliers that it tried."""
    search = BudgetSearch(budget, **arguments)
    tried = []
    while (multiplier := search.next()) is not None:
        tried.append(multiplier)
        search.put(multiplier, curve(multiplier))
    return search.found, tried


def saturating(scale: float, power: float, most: float) -> Curve:
    """What KL looks like: a power of the multiplier that ends at some height."""
    return lambda m: most * -math.expm1(-scale * m**power / most)


@given(
    log_scale=st.floats(-7, 3.5),
    power=st.floats(1.6, 2.4),
    most=st.floats(0.5, 20),
    budget=st.sampled_from([0.01, 0.1, 0.3]),
)
def test_curve_that_grows_as_kl_does_is_met_in_five_tries(
    log_scale: float, power: float, most: float, budget: float
) -> None:
    curve = saturating(2.0**log_scale, power, most)
    found, tried = searched(curve, budget)
    if curve(LOWEST) > budget or curve(HIGHEST) < 0.9 * budget:
        assert found is None
        return
    assert found is not None and 0.9 * budget <= curve(found) <= budget
    assert len(tried) <= 5


@st.composite
def polylines(draw: st.DrawFn) -> Curve:
    """Continuous in log-log, and anything but monotone."""
    ys = draw(st.lists(st.floats(-6, 4), min_size=2, max_size=8))
    low, high = math.log2(LOWEST), math.log2(HIGHEST)

    def curve(m: float) -> float:
        place = (math.log2(m) - low) / (high - low) * (len(ys) - 1)
        i = min(max(int(place), 0), len(ys) - 2)
        return math.pow(2.0, ys[i] + (ys[i + 1] - ys[i]) * (place - i))

    return curve


@given(curve=polylines())
def test_answer_meets_the_budget_and_is_the_largest_that_was_tried_and_does(curve: Curve) -> None:
    budget = 0.5
    found, tried = searched(curve, budget)
    meets = [m for m in tried if 0.9 * budget <= curve(m) <= budget]
    assert found == (max(meets) if meets else None)
    assert len(tried) == len(set(tried)) <= MAX_TRIES
    assert all(LOWEST <= m <= HIGHEST for m in tried)


@given(curve=polylines())
def test_curve_that_was_seen_on_both_sides_of_the_budget_is_met(curve: Curve) -> None:
    found, tried = searched(curve, 0.5)
    costs = [curve(m) for m in tried]
    if min(costs) < 0.45 and max(costs) > 0.5 and len(tried) < MAX_TRIES:
        assert found is not None


@given(values=st.lists(st.sampled_from([math.nan, math.inf, -1.0, 0.0, 5.0]), min_size=1))
def test_search_ends_whatever_a_try_costs(values: list[float]) -> None:
    costs = iter(values * MAX_TRIES)
    found, tried = searched(lambda _: next(costs), 0.1)
    assert found is None and 1 <= len(tried) <= MAX_TRIES


def test_clamp_of_a_feature_that_always_fires_is_met_though_weaker_ones_cost_more() -> None:
    rng, met = random.Random(1), []
    for _ in range(600):
        activation = 2 ** rng.uniform(-3, 4)
        spread, scale = activation * rng.uniform(0.05, 0.3), 2 ** rng.uniform(-8, 4)

        def curve(
            m: float, least: float = spread**2, scale: float = scale, at: float = activation
        ) -> float:
            return 8 * -math.expm1(-scale * ((m - at) ** 2 + least) / 8)

        least, ablated = curve(activation), curve(LOWEST)
        budget = least * (ablated / least) ** rng.uniform(0.1, 0.9)
        if 1.3 * least < budget < ablated / 1.3:
            met.append(searched(curve, budget)[0] is not None)
    assert len(met) > 400
    assert sum(met) >= 0.93 * len(met)


def test_curve_that_leaps_over_the_budget_ends_without_an_answer() -> None:
    found, tried = searched(lambda m: 0.05 if m < 3 else 0.5, 0.1)
    assert found is None and len(tried) <= MAX_TRIES


def test_of_two_crossings_the_one_at_the_larger_multiplier_is_followed() -> None:
    # Up to 1 at m = 1, down to 0.0625 at m = 16, and up again.
    xs = {-6.0: -12.0, 0.0: 0.0, 4.0: -4.0, 6.0: 2.0}

    def curve(m: float) -> float:
        x = math.log2(m)
        left = max(place for place in xs if place <= x)
        right = min(place for place in xs if place >= x)
        if left == right:
            return math.pow(2.0, xs[left])
        return math.pow(2.0, xs[left] + (xs[right] - xs[left]) * (x - left) / (right - left))

    search = BudgetSearch(0.25)
    for m in (1.0, 16.0, 64.0):
        search.put(m, curve(m))
    while (multiplier := search.next()) is not None:
        search.put(multiplier, curve(multiplier))
    assert search.found is not None and search.found > 16


@pytest.mark.parametrize("highest", [1.0, 2.5])
def test_no_multiplier_beyond_the_limit_of_the_values_is_tried(highest: float) -> None:
    found, tried = searched(lambda m: 0.01 * m * m, 0.1, highest=highest)
    assert found is None
    assert max(tried) == highest


def test_edit_that_no_multiplier_changes_is_tried_once() -> None:
    assert searched(lambda _: 0.2, 0.1, lowest=1.0, highest=1.0) == (None, [1.0])
    assert searched(lambda _: 0.095, 0.1, lowest=1.0, highest=1.0) == (1.0, [1.0])


def test_multipliers_are_short_numbers() -> None:
    _, tried = searched(lambda m: 3 * m * m, 0.1)
    assert all(float(f"{m:.4g}") == m for m in tried)
