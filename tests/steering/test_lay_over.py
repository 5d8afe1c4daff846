"""A request's `steering` beside a preset's."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from steering.errors import SteeringError
from steering.request.lay_over import lay_over
from steering.request.parse import parse_spec
from tests.steering.specs import ONE, TWO

ABLATE = {"sae": "a", "feature": 1, "op": "ablate"}
ADD = {"sae": "a", "feature": 2, "op": "add", "value": 1}
PRESET = {"interventions": [ABLATE, ADD], "positions": {"prompt": False}, "report": None}


def test_own_intervention_replaces_all_of_the_presets_of_its_feature() -> None:
    twice = [
        {**ABLATE, "positions": {"prompt": False}},
        {**ABLATE, "positions": {"generation": False}},
        ADD,
    ]
    own = {"sae": "a", "feature": 1, "op": "scale", "value": 2}
    laid: Any = lay_over({"interventions": twice}, {"interventions": [own]})
    assert laid == {"interventions": [own, ADD]}


def test_other_interventions_are_added() -> None:
    for other in ({**ABLATE, "feature": 3}, {**ABLATE, "sae": "b"}):
        laid: Any = lay_over(PRESET, {"interventions": [other]})
        assert laid["interventions"] == [other, ABLATE, ADD]


@pytest.mark.parametrize(("own", "kept"), [(None, "a"), ("a", None)])
def test_sae_left_out_means_the_only_one(own: str | None, kept: str | None) -> None:
    preset = {"interventions": [{"sae": kept, "feature": 1, "op": "ablate"}]}
    edit = {"feature": 1, "op": "scale", "value": 2} | ({"sae": own} if own else {})
    assert lay_over(preset, {"interventions": [edit]}, only_sae="a") == {"interventions": [edit]}


def test_each_other_member_replaces_the_presets_and_null_is_left_out() -> None:
    request = {"positions": {"start": 3}, "report": True, "when": None, "interventions": None}
    assert lay_over(PRESET, request) == {
        "interventions": [ABLATE, ADD],
        "positions": {"start": 3},
        "report": True,
    }
    assert lay_over({**PRESET, "positions": {"end": 5}}, {"positions": None}) == {
        "interventions": [ABLATE, ADD],
        "positions": {"end": 5},
    }


@pytest.mark.parametrize("request_", [None, {}, {"interventions": []}, {"interventions": None}])
def test_request_that_says_nothing_changes_nothing(request_: Any) -> None:
    assert parse_spec(lay_over(PRESET, request_), ONE) == parse_spec(PRESET, ONE)


def test_neither_side_is_changed() -> None:
    preset, request = copy.deepcopy(PRESET), {"interventions": [{**ABLATE, "feature": 4}]}
    before = copy.deepcopy(request)
    laid: Any = lay_over(preset, request)
    laid["interventions"].clear()
    assert (preset, request) == (PRESET, before)


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (3, "invalid_type", "steering"),
        ({"interventions": {}}, "invalid_type", "steering.interventions"),
        ({"interventions": [7]}, "invalid_type", "steering.interventions[0]"),
        (
            {"interventions": [ABLATE, {**ABLATE, "feature": [1]}]},
            "invalid_type",
            "steering.interventions[1].feature",
        ),
        (
            {"interventions": [{**ABLATE, "feature": 10}]},
            "feature_out_of_range",
            "steering.interventions[0].feature",
        ),
        (
            {"interventions": [{**ABLATE, "sae": ["a"]}]},
            "invalid_type",
            "steering.interventions[0].sae",
        ),
        (
            {"interventions": [{**ABLATE, "feature": True}]},
            "invalid_type",
            "steering.interventions[0].feature",
        ),
        ({"x": None}, None, None),
        ({"x": 1}, "unknown_field", "steering.x"),
        (
            {"protect": [{"sae": "b", "feature": 1}]},
            "invalid_value",
            "steering.protect[0]",
        ),
    ],
)
def test_refusal_names_the_path_in_the_request(
    request_: Any, code: str | None, param: str | None
) -> None:
    laid = lay_over(PRESET, request_)
    if code is None:
        parse_spec(laid, TWO)
        return
    with pytest.raises(SteeringError) as refused:
        parse_spec(laid, TWO)
    assert (refused.value.code, refused.value.param) == (code, param)
