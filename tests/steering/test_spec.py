"""The ``steering`` field: every line of the error table, and what counts as the same steering."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.errors import SteeringError
from steering.request.limits import OPEN_END, POSITION_LIMIT
from steering.request.parse import parse_spec
from steering.request.positions import Positions
from steering.request.spec import SteeringSpec
from tests.steering.specs import EDIT, HERE, ONE, TWO, Facts, edit


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        # types
        (3, "invalid_type", "steering"),
        ([], "invalid_type", "steering"),
        ({"interventions": {}}, "invalid_type", "steering.interventions"),
        ({"interventions": [7]}, "invalid_type", HERE),
        (edit(feature=True), "invalid_type", f"{HERE}.feature"),
        (edit(feature=1.5), "invalid_type", f"{HERE}.feature"),
        (edit(feature=7.0), "invalid_type", f"{HERE}.feature"),
        (edit(feature="3"), "invalid_type", f"{HERE}.feature"),
        (edit(feature=None), "invalid_type", f"{HERE}.feature"),
        (edit(op=3), "invalid_type", f"{HERE}.op"),
        (edit(unit=3), "invalid_type", f"{HERE}.unit"),
        (edit(sae=3), "invalid_type", f"{HERE}.sae"),
        (edit(value="2"), "invalid_type", f"{HERE}.value"),
        (edit(value=True), "invalid_type", f"{HERE}.value"),
        (edit(positions=[]), "invalid_type", f"{HERE}.positions"),
        (edit(positions={"prompt": 1}), "invalid_type", f"{HERE}.positions.prompt"),
        (edit(positions={"start": 1.0}), "invalid_type", f"{HERE}.positions.start"),
        (edit(positions={"end": True}), "invalid_type", f"{HERE}.positions.end"),
        ({**edit(), "report": 1}, "invalid_type", "steering.report"),
        ({**edit(), "error_term": 0}, "invalid_type", "steering.error_term"),
        ({**edit(), "positions": "all"}, "invalid_type", "steering.positions"),
        ({**edit(), "read": True}, "invalid_type", "steering.read"),
        ({"read": {"top_k": 2.0}}, "invalid_type", "steering.read.top_k"),
        # ranges
        (edit(feature=-1), "feature_out_of_range", f"{HERE}.feature"),
        (edit(feature=10), "feature_out_of_range", f"{HERE}.feature"),
        (edit(feature=10**5000), "feature_out_of_range", f"{HERE}.feature"),
        # values
        (edit(feature=...), "invalid_value", f"{HERE}.feature"),
        (edit(op=...), "invalid_value", f"{HERE}.op"),
        (edit(op="set"), "invalid_value", f"{HERE}.op"),
        (edit(unit="percent"), "invalid_value", f"{HERE}.unit"),
        (edit(value=...), "invalid_value", f"{HERE}.value"),
        (edit(value=None), "invalid_value", f"{HERE}.value"),
        (edit(op="ablate"), "invalid_value", f"{HERE}.value"),
        (edit(value=float("nan")), "invalid_value", f"{HERE}.value"),
        (edit(value=float("inf")), "invalid_value", f"{HERE}.value"),
        (edit(value=1.1e6), "invalid_value", f"{HERE}.value"),
        (edit(value=-(10**400)), "invalid_value", f"{HERE}.value"),
        (edit(op="scale", unit="max_act"), "invalid_value", f"{HERE}.unit"),
        ({"read": {"top_k": 0}}, "invalid_value", "steering.read.top_k"),
        ({"read": {"top_k": 65}}, "invalid_value", "steering.read.top_k"),
        (edit(positions={"start": 2**31}), "invalid_value", f"{HERE}.positions.start"),
        (edit(positions={"end": -(2**31) - 1}), "invalid_value", f"{HERE}.positions.end"),
        (edit(positions={"end": 10**400}), "invalid_value", f"{HERE}.positions.end"),
        ({}, "invalid_value", "steering.interventions"),
        ({"interventions": []}, "invalid_value", "steering.interventions"),
        ({"interventions": None}, "invalid_value", "steering.interventions"),
        # can never apply
        (
            edit(positions={"prompt": False, "generation": False}),
            "invalid_value",
            f"{HERE}.positions",
        ),
        (edit(positions={"start": 5, "end": 5}), "invalid_value", f"{HERE}.positions"),
        (edit(positions={"end": 0}), "invalid_value", f"{HERE}.positions"),
        (edit(positions={"start": -2, "end": -2}), "invalid_value", f"{HERE}.positions"),
        (edit(positions={"start": -2, "end": 0}), "invalid_value", f"{HERE}.positions"),
        (edit(positions={"prompt": False, "end": -1}), "invalid_value", f"{HERE}.positions"),
        (
            {**edit(), "positions": {"start": 7, "end": 6}},
            "invalid_value",
            "steering.positions",
        ),
        (
            {"read": {}, "positions": {"prompt": False, "generation": False}},
            "invalid_value",
            "steering.positions",
        ),
        # unknown fields
        ({**edit(), "strength": 1}, "unknown_field", "steering.strength"),
        (edit(latent=1), "unknown_field", f"{HERE}.latent"),
        (edit(**{"x" * 90: 1}), "unknown_field", f"{HERE}.{'x' * 90}"),
        (edit(positions={"from": 1}), "unknown_field", f"{HERE}.positions.from"),
        ({"read": {"k": 1}}, "unknown_field", "steering.read.k"),
        # SAEs
        (edit(sae="z"), "unknown_sae", f"{HERE}.sae"),
        ({"read": {"sae": "z"}}, "unknown_sae", "steering.read.sae"),
        # statistics
        (edit(feature=7, unit="max_act"), "max_act_unknown", f"{HERE}.unit"),
        (edit(feature=5, unit="max_act"), "max_act_unknown", f"{HERE}.unit"),
        (
            edit(feature=7, op="ablate", value=..., unit="max_act"),
            "max_act_unknown",
            f"{HERE}.unit",
        ),
        # counts
        (
            {"interventions": [EDIT] * 65},
            "too_many_interventions",
            "steering.interventions",
        ),
        (
            {"interventions": [EDIT, {"feature": 2, "op": "ablate"}, EDIT]},
            "duplicate_intervention",
            "steering.interventions[2]",
        ),
    ],
)
def test_a_wrong_field_is_refused_with_its_code_and_path(
    raw: object, code: str, param: str
) -> None:
    with pytest.raises(SteeringError) as refused:
        parse_spec(raw, ONE)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert len(refused.value.message) < 200


def test_without_saes_steering_is_unavailable() -> None:
    with pytest.raises(SteeringError) as refused:
        parse_spec(edit(), {})
    assert (refused.value.code, refused.value.param) == ("steering_unavailable", "steering")


def test_with_several_saes_each_edit_must_name_its_own() -> None:
    with pytest.raises(SteeringError) as refused:
        parse_spec(edit(), TWO)
    assert (refused.value.code, refused.value.param) == ("sae_required", f"{HERE}.sae")
    with pytest.raises(SteeringError) as refused:
        parse_spec({"read": {}}, TWO)
    assert refused.value.param == "steering.read.sae"


def test_a_full_reconstruction_with_two_saes_at_one_hook_is_refused() -> None:
    def both(second: str) -> dict[str, Any]:
        items = [{**EDIT, "sae": "a"}, {**EDIT, "sae": second}]
        return {"interventions": items, "error_term": False}

    with pytest.raises(SteeringError) as refused:
        parse_spec(both("b"), TWO)
    assert refused.value.code == "unsupported_combination"
    assert refused.value.param == "steering.error_term"
    assert parse_spec(both("c"), TWO).error_term is False


def test_the_same_feature_may_be_edited_twice_on_different_tokens() -> None:
    windows = [{"end": 5}, {"start": 5}]
    phases = [{"prompt": False}, {"generation": False}]
    for where in (windows, phases):
        spec = parse_spec({"interventions": [{**EDIT, "positions": p} for p in where]}, ONE)
        assert len(spec.edits) == 2


def test_an_edits_own_positions_take_what_they_leave_out_from_the_requests() -> None:
    raw = {
        "interventions": [{**EDIT, "positions": {"prompt": False, "end": None}}],
        "positions": {"start": 3, "end": 9, "special_tokens": True},
    }
    [made] = parse_spec(raw, ONE).edits
    assert made.positions == Positions(False, True, True, 3, 9)


def test_null_stands_for_left_out_in_optional_fields() -> None:
    nulls = {
        "interventions": [{**EDIT, "sae": None, "unit": None, "positions": None}],
        "positions": None,
        "error_term": None,
        "report": None,
        "read": None,
    }
    assert parse_spec(nulls, ONE) == parse_spec(edit(), ONE)


@pytest.mark.parametrize(
    "raw",
    [
        edit(value=1e6),
        edit(value=-1_000_000),
        edit(feature=9),
        edit(positions={"start": POSITION_LIMIT}),
        edit(positions={"end": POSITION_LIMIT}),
        edit(positions={"start": -(2**31)}),
        edit(positions={"end": -(2**31)}),
        {**edit(), "max_share": 10},
        {"read": {"top_k": 64}},
        {"read": {}, "positions": {"start": POSITION_LIMIT}},
        {"interventions": [EDIT], "protect": [{"feature": 2}] * 64},
    ],
)
def test_what_a_limit_names_is_within_it(raw: dict[str, Any]) -> None:
    parse_spec(raw, ONE)


def test_last_position_as_start_and_end_is_an_empty_window() -> None:
    window = {"start": POSITION_LIMIT, "end": POSITION_LIMIT}
    with pytest.raises(SteeringError, match="is empty"):
        parse_spec(edit(positions=window), ONE)
    assert canonical(edit(positions={"end": POSITION_LIMIT})) == canonical(edit())


def test_defaults_are_those_of_the_contract() -> None:
    spec = parse_spec({**edit(), "read": {}}, ONE)
    assert spec.error_term is True
    assert spec.report is False
    assert spec.read is not None
    assert spec.read.top_k == 5
    assert spec.positions == Positions(True, True, False, 0, OPEN_END)


def test_value_that_float32_cannot_hold_is_refused() -> None:
    class Huge(Facts):
        def max_activation(self, feature: int) -> float | None:
            return 1e35

    with pytest.raises(SteeringError, match="exceeds float32") as refused:
        parse_spec(edit(value=1e6, unit="max_act"), {"a": Huge()})
    assert (refused.value.code, refused.value.param) == ("invalid_value", f"{HERE}.value")
    parse_spec(edit(value=1e3, unit="max_act"), {"a": Huge()}).canonical()


def test_max_act_multiplies_by_the_recorded_maximum() -> None:
    [made] = parse_spec(edit(unit="max_act", value=2), ONE).edits
    assert made.effective_value == 5.0
    assert made.value == 2.0


SAME = [
    edit(),
    edit(value=2.0),
    edit(sae="a"),
    edit(unit="raw"),
    edit(unit="max_act", value=0.8),
    edit(positions={"prompt": True, "generation": True, "special_tokens": False, "start": 0}),
    {**edit(), "report": True},
    {**edit(), "read": {"top_k": 9}},
    {**edit(), "error_term": True},
]
DIFFERENT = [
    edit(value=2.5),
    edit(feature=2),
    edit(op="add"),
    edit(positions={"special_tokens": True}),
    edit(positions={"prompt": False}),
    edit(positions={"start": 1}),
    edit(positions={"end": 9}),
    {**edit(), "error_term": False},
    {"interventions": [EDIT, {"feature": 2, "op": "ablate"}]},
]


def canonical(raw: dict[str, Any]) -> bytes:
    return parse_spec(raw, ONE).canonical()


@pytest.mark.parametrize("raw", SAME)
def test_equal_effects_have_one_canonical_form(raw: dict[str, Any]) -> None:
    assert canonical(raw) == canonical(edit())


@pytest.mark.parametrize("raw", DIFFERENT)
def test_different_effects_have_different_canonical_forms(raw: dict[str, Any]) -> None:
    assert canonical(raw) != canonical(edit())


def test_ablate_is_a_clamp_to_zero() -> None:
    assert canonical(edit(op="ablate", value=...)) == canonical(edit(value=0))
    assert canonical(edit(value=-0.0)) == canonical(edit(value=0))


@given(st.permutations(range(6)))
def test_the_order_of_edits_does_not_count(order: list[int]) -> None:
    items = [{"feature": f, "op": "add", "value": f + 1} for f in range(6)]
    assert canonical({"interventions": [items[i] for i in order]}) == canonical(
        {"interventions": items}
    )


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    [
                        *("interventions", "sae", "feature", "op", "value", "unit", "positions"),
                        *("read", "top_k", "report", "error_term", "start", "end", "prompt", "x"),
                    ]
                ),
                inner,
                max_size=6,
            )
        ),
        max_leaves=30,
    )
)
def test_whatever_json_arrives_it_is_a_spec_or_a_readable_refusal(raw: object) -> None:
    try:
        assert isinstance(parse_spec(raw, TWO), SteeringSpec)
    except SteeringError as refused:
        assert refused.code
        assert refused.param is not None
        assert refused.param.startswith("steering")


@given(
    prompt=st.booleans(),
    generation=st.booleans(),
    start=st.integers(0, 12),
    end=st.integers(0, 12) | st.just(POSITION_LIMIT),
    prompt_len=st.integers(0, 10),
    more=st.integers(0, 10),
)
def test_as_many_positions_are_covered_as_counting_them_finds(
    prompt: bool, generation: bool, start: int, end: int, prompt_len: int, more: int
) -> None:
    where = Positions(prompt=prompt, generation=generation, start=start, end=end)
    covered = [
        position
        for position in range(prompt_len + more)
        if start <= position < end and (prompt if position < prompt_len else generation)
    ]
    assert where.count(prompt_len, prompt_len + more) == len(covered)
