"""The strength of an edit: what a multiplier makes of it, and how far it may go."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.errors import SteeringError
from steering.report import Report
from steering.request.accepted import Accepted
from steering.request.catalog import Prepared
from steering.request.parse import parse_spec
from steering.studies.calibrate import mean_share, multipliers, scaled
from steering.studies.neutral import neutral_passages
from steering.studies.rank import output_score
from tests.steering.specs import ONE


def accepted(*interventions: dict[str, Any]) -> Accepted:
    field = {"interventions": [{"feature": 7, **item} for item in interventions]}
    return Accepted(parse_spec(field, ONE), Prepared({}))


def test_multiplier_moves_every_operation_away_from_doing_nothing() -> None:
    steering = {
        "interventions": [
            {"feature": 1, "op": "clamp", "value": 2, "unit": "max_act"},
            {"feature": 2, "op": "add", "value": -3},
            {"feature": 3, "op": "floor", "value": 0.5, "positions": {"prompt": False}},
            {"feature": 4, "op": "scale", "value": 3},
            {"feature": 5, "op": "scale", "value": 0.5},
            {"feature": 6, "op": "ablate"},
            {"feature": 7, "op": "cap", "value": 1},
        ],
        "max_share": 0.5,
    }
    found = scaled(steering, 2.0)
    assert [item.get("value") for item in found["interventions"]] == [4, -6, 1, 5, 0, None, 1]
    assert found["max_share"] == 0.5
    assert found["interventions"][2]["positions"] == {"prompt": False}
    assert steering["interventions"][0]["value"] == 2  # type: ignore[index]
    assert scaled(steering, 1.0) == steering


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([{"op": "clamp", "value": 2}], (1 / 64, 64)),
        ([{"op": "clamp", "value": 1e5}], (1 / 64, 10)),
        ([{"op": "scale", "value": -(10**5) + 1}], (1 / 64, 9.99999)),
        ([{"op": "add", "value": 1}, {"feature": 8, "op": "add", "value": -1e6}], (1 / 64, 1)),
        ([{"op": "clamp", "value": 0}], (1, 1)),
        ([{"op": "scale", "value": 1}, {"feature": 8, "op": "ablate"}], (1, 1)),
    ],
)
def test_multipliers_keep_values_within_their_limits(
    items: list[dict[str, Any]], expected: tuple[float, float]
) -> None:
    assert multipliers(accepted(*items)) == pytest.approx(expected)


@given(value=st.floats(1e-3, 1e6), op=st.sampled_from(["clamp", "scale"]))
def test_edit_at_the_largest_multiplier_is_a_valid_one(value: float, op: str) -> None:
    _, highest = multipliers(accepted({"op": op, "value": value}))
    steering = {"interventions": [{"feature": 7, "op": op, "value": value}]}
    parse_spec(scaled(steering, 2.0 ** math.log2(highest)), ONE)


def test_edit_without_a_strength_cannot_be_calibrated() -> None:
    with pytest.raises(SteeringError) as refused:
        multipliers(accepted({"op": "ablate"}, {"feature": 8, "op": "cap", "value": 1}))
    assert (refused.value.code, refused.value.param) == (
        "unsupported_op",
        "steering.interventions",
    )


def edited(*hooks: tuple[int, float | None]) -> Report:
    entries = [{"tokens": tokens, "mean_share": share} for tokens, share in hooks]
    return Report([], 0, edited=entries)


def test_share_is_the_mean_over_edited_tokens_and_unknown_where_one_is() -> None:
    reports = [edited((3, 0.1), (1, 0.5)), edited((4, 0.4)), edited()]
    assert mean_share(reports) == pytest.approx((0.3 + 0.5 + 1.6) / 8)
    assert mean_share([edited((3, 0.1)), edited((1, None))]) is None
    assert mean_share([edited()]) is None


def test_output_score_is_of_the_best_rank_and_the_largest_probability() -> None:
    # Arad et al. (2505.20063): (1 - rank / V) times the probability.
    assert output_score([30, 5], [-2.0, -3.0], 100) == pytest.approx(0.95 * 0.1353353)
    assert output_score([0], [0.0], 50_000) == 1.0


def test_neutral_text_is_short_plain_passages() -> None:
    passages = neutral_passages()
    assert len(passages) == 13 == len(set(passages))
    assert all(500 < len(passage) < 800 and passage.isascii() for passage in passages)
