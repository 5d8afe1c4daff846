"""From a validated field to what the workers are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.errors import SteeringError
from steering.request.cache_salt import cache_salt
from steering.request.limits import POSITION_LIMIT
from steering.request.parse import parse_spec
from steering.request.plan import (
    GATE_ABOVE,
    GATE_BELOW,
    SCOPE_PROMPT,
    SCOPE_SO_FAR,
    SCOPE_STOP,
    SCOPE_TOKEN,
    PlannedGate,
    SteeringPlan,
)
from steering.request.planning import make_plan
from steering.request.positions import Positions
from tests.steering.specs import EDIT, TWO, Facts

SAES = {**TWO, "early": Facts("blocks.0.hook_resid_post")}
INDEX = {name: i for i, name in enumerate(SAES)}


def plan(raw: object, prompt_len: int = 10) -> SteeringPlan:
    return make_plan(parse_spec(raw, SAES), INDEX, "key", 1, prompt_len)


def at(start: int | None = None, end: int | None = None, feature: int = 1) -> dict[str, Any]:
    return {**EDIT, "sae": "a", "feature": feature, "positions": {"start": start, "end": end}}


def test_gates_are_distinct_and_edits_name_them_by_bits() -> None:
    fires = {"sae": "early", "feature": 3, "above": 0.1}
    so_far = {"sae": "a", "feature": 4, "below": 2, "scope": "so_far"}
    prompt = {"sae": "c", "feature": 5, "above": 1, "scope": "prompt"}
    made = plan(
        {
            "interventions": [
                {**EDIT, "sae": "a", "feature": 1, "when": [so_far, fires]},
                {**EDIT, "sae": "a", "feature": 2, "when": {"any": [fires, prompt]}},
                {**EDIT, "sae": "a", "feature": 3},
                {**EDIT, "sae": "a", "feature": 4, "when": "always"},
            ],
            "positions": {"prompt": False},
            "when": fires,
            "stop_when": [{"sae": "early", "feature": 3, "above": 0.1}],
        }
    )
    tenth = 0.10000000149011612  # in float32
    assert made.gates == (
        PlannedGate(0, 4, GATE_BELOW, 2.0, SCOPE_SO_FAR),
        PlannedGate(3, 3, GATE_ABOVE, tenth, SCOPE_TOKEN),
        PlannedGate(2, 5, GATE_ABOVE, 1.0, SCOPE_PROMPT),
        PlannedGate(3, 3, GATE_ABOVE, tenth, SCOPE_STOP),
    )
    gated = [(planned.gates, planned.any_gate) for planned in made.edits]
    assert gated == [(0b011, False), (0b110, True), (0b010, False), (0, False)]


@pytest.mark.parametrize("share", [1e-300, 1e-46, 1e-39])
def test_share_that_float32_has_not_still_is_a_limit_with_a_sign(share: float) -> None:
    made = plan({"interventions": [{**EDIT, "sae": "a"}], "max_share": share}).max_share
    assert made is not None
    # Devices may flush what is smaller to zero.
    assert np.finfo(np.float32).tiny <= np.float32(made) < 1e-37


def test_plan_survives_the_wire() -> None:
    made = plan(
        {
            "interventions": [{**EDIT, "sae": "a"}],
            "when": {"sae": "early", "feature": 3, "above": 1},
            "match": "reread",
            "protect": [{"sae": "a", "feature": 7}],
            "max_share": 0.1,
            "read": {"sae": "c", "stream": True},
            "report": True,
        }
    )
    assert SteeringPlan.from_wire(made.to_wire()) == made
    assert made.reread
    assert made.protect == ((0, 7),)
    assert made.max_share == pytest.approx(0.1)
    assert made.read is not None
    assert made.read.stream


@pytest.mark.parametrize(
    ("start", "end", "window"),
    [
        (-1, None, (9, POSITION_LIMIT)),
        (None, -1, (0, 9)),
        (-4, -2, (6, 8)),
        (3, -2, (3, 8)),
        (-3, 9, (7, 9)),
        (-99, None, (0, POSITION_LIMIT)),
        (-99, -98, (0, 0)),
        (9, -9, (9, 1)),
        (-1, 3, (9, 3)),
    ],
)
def test_negative_positions_count_from_the_prompts_end(
    start: int | None, end: int | None, window: tuple[int, int]
) -> None:
    [made] = plan({"interventions": [at(start, end)]}).edits
    assert (made.start, made.end) == window
    read = plan({"read": {"sae": "a"}, "positions": {"start": start, "end": end}}).read
    assert read is not None
    assert (read.start, read.end) == window


BOUND = st.none() | st.integers(-14, 14)


@given(start=BOUND, end=BOUND, prompt_len=st.integers(1, 12))
def test_window_is_a_python_slice_of_the_prompt(
    start: int | None, end: int | None, prompt_len: int
) -> None:
    where = Positions(
        generation=False, start=start or 0, end=POSITION_LIMIT if end is None else end
    ).at(prompt_len)
    covered = [p for p in range(prompt_len) if where.start <= p < where.end]
    assert covered == [*range(prompt_len)][slice(start, end)]
    if where.empty:
        assert covered == []


@given(
    first=st.tuples(BOUND, BOUND),
    second=st.tuples(BOUND, BOUND),
    prompt_len=st.integers(1, 12),
    phases=st.tuples(*[st.booleans()] * 4),
)
def test_no_token_is_covered_twice_by_edits_of_one_feature(
    first: tuple[Any, Any], second: tuple[Any, Any], prompt_len: int, phases: tuple[bool, ...]
) -> None:
    items = [at(*first), at(*second)]
    for i, item in enumerate(items):
        item["positions"] |= {"prompt": phases[2 * i], "generation": phases[2 * i + 1]}
    try:
        made = plan({"interventions": items}, prompt_len)
    except SteeringError:
        return
    for position in range(60):
        bit = 1 if position < prompt_len else 2
        covering = [e for e in made.edits if e.coverage & bit and e.start <= position < e.end]
        assert len(covering) <= 1


def test_windows_that_meet_only_in_a_short_prompt_are_refused_for_it_alone() -> None:
    field = {"interventions": [at(0, 5), at(-5)]}
    plan(field, prompt_len=10)
    with pytest.raises(SteeringError) as refused:
        plan(field, prompt_len=9)
    assert refused.value.code == "duplicate_intervention"
    assert refused.value.param == "steering.interventions[1]"
    with pytest.raises(SteeringError):
        parse_spec({"interventions": [at(-5), at(-6, -4)]}, SAES)
    parse_spec({"interventions": [at(-5), at(None, -5)]}, SAES)


# Who shares blocks


def salt(raw: object, prompt_len: int) -> str | None:
    return cache_salt(parse_spec(raw, SAES), dict.fromkeys(SAES, "0"), prompt_len, None)


def test_negative_position_shares_with_the_equal_positive_one() -> None:
    last = {"interventions": [at(-3)]}
    assert salt(last, 10) == salt({"interventions": [at(7)]}, 10)
    assert salt(last, 10) == salt({"interventions": [at(7)]}, 99)
    assert salt(last, 10) != salt(last, 11)
    assert salt({"interventions": [at(-99)]}, 10) == salt({"interventions": [at()]}, 10)


def test_edit_that_covers_nothing_parts_no_request() -> None:
    nothing = at(9, -9, feature=2)
    assert salt({"interventions": [nothing]}, 10) is None
    assert salt({"interventions": [nothing, at(4)]}, 10) == salt({"interventions": [at(4)]}, 10)
    assert salt({"interventions": [nothing]}, 30) is not None
    only = {**nothing, "positions": {**nothing["positions"], "generation": False}}
    assert salt({"interventions": [only, at(4)]}, 10) == salt({"interventions": [at(4)]}, 10)


def test_read_window_may_count_from_the_prompts_end() -> None:
    where = parse_spec({"read": {"sae": "a"}, "positions": {"start": -2}}, SAES).positions
    assert where.count(10, 15) == 7
    assert Positions(start=-4, end=-2).count(10, 15) == 2
    assert Positions(start=12, end=-2).count(10, 15) == 0
