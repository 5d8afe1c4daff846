"""Groups of candidates, followed down to the few that matter."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from hypothesis import given
from hypothesis import strategies as st

from steering.studies.group_search import (
    FIRST_GROUPS,
    WANTED,
    Members,
    most_measurements,
    strongest,
)


def followed(
    effects: Mapping[int, float],
    weights: Mapping[int, float] | None = None,
    *,
    together: int = 64,
    apart: frozenset[int] = frozenset(),
) -> tuple[dict[int, float], list[Members]]:
    """What is found where effects add up, and the groups that were measured.

    Args:
        effects: by candidate.
        weights: equal if left out.
        together: most candidates of a group.
        apart: candidates of which no two can be measured together.
    """
    measured: list[Members] = []

    async def measure(groups: Sequence[Members]) -> list[float | None]:
        measured.extend(groups)
        return [
            None if len(apart & set(group)) > 1 else sum(effects[one] for one in group)
            for group in groups
        ]

    of = dict.fromkeys(effects, 1.0) if weights is None else weights
    return asyncio.run(strongest(of, measure, together=together)), measured


@given(
    number=st.integers(256, 600),
    causes=st.dictionaries(st.integers(0, 255), st.floats(1, 3), min_size=4, max_size=4),
)
def test_four_causes_of_many_are_found_with_few_measurements(
    number: int, causes: dict[int, float]
) -> None:
    effects = {**dict.fromkeys(range(number), 0.0), **causes}
    found, measured = followed(effects)
    assert {one: found[one] for one in causes} == causes
    assert len(measured) <= 0.15 * number


@given(
    effects=st.lists(st.floats(-5, 5).map(lambda x: round(x, 2)), min_size=1, max_size=80),
    together=st.integers(1, 64),
)
def test_what_is_found_is_what_each_does_alone(effects: list[float], together: int) -> None:
    of = dict(enumerate(effects))
    found, measured = followed(of, together=together)
    assert all(found[one] == of[one] for one in found)
    assert all(len(group) <= together for group in measured)
    assert len(measured) <= most_measurements(len(effects))


@given(effects=st.lists(st.floats(0.1, 5), min_size=WANTED, max_size=80))
def test_strongest_of_one_sign_are_never_left_out(effects: list[float]) -> None:
    found, _ = followed(dict(enumerate(effects)))
    strongest_first = sorted(range(len(effects)), key=lambda one: -effects[one])
    threshold = effects[strongest_first[WANTED - 1]]
    assert all(one in found for one in range(len(effects)) if effects[one] > threshold)


def test_few_candidates_are_each_measured_alone() -> None:
    found, measured = followed({3: 0.0, 8: -2.0, 9: 1.0})
    assert found == {3: 0.0, 8: -2.0, 9: 1.0}
    assert sorted(measured) == [(3,), (8,), (9,)]


def test_where_nothing_moves_nothing_is_followed() -> None:
    found, measured = followed(dict.fromkeys(range(100), 0.0))
    assert found == {} and len(measured) == FIRST_GROUPS


def test_candidates_that_cannot_be_measured_together_are_told_apart() -> None:
    effects = {**dict.fromkeys(range(64), 0.0), 5: 2.0, 6: 1.0, 7: 3.0}
    found, _ = followed(effects, apart=frozenset(range(64)))
    assert {one: found[one] for one in (5, 6, 7)} == {5: 2.0, 6: 1.0, 7: 3.0}


def test_candidate_of_which_much_is_expected_stands_among_few() -> None:
    weights = {**dict.fromkeys(range(100), 0.1), 0: 50.0}
    _, measured = followed(dict.fromkeys(range(100), 0.0), weights)
    assert (0,) in measured
