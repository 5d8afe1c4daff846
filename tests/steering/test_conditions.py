"""`when` and `stop_when`: what they mean, what is refused, and who then shares blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sae.card import HookPoint
from sae.pass_order import place_in_pass
from steering.errors import SteeringError
from steering.request.cache_salt import cache_salt
from steering.request.condition_rules import refuse_across_stages
from steering.request.conditions import Condition, When
from steering.request.parse import parse_spec
from tests.steering.specs import EDIT, HERE, ONE, Facts, edit

FIRES: dict[str, Any] = {"feature": 3, "above": 0.5}
GENERATION = {"prompt": False}

#: One SAE at each place, in the order in which a pass comes by them.
PLACES = [
    *("blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"),
    *("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"),
    *("blocks.2.hook_resid_pre", "blocks.10.hook_resid_pre"),
]
SAES = {f"s{i}": Facts(hook) for i, hook in enumerate(PLACES)}
TRANSCODER = Facts("blocks.1.hook_mlp_out", affine=False, read_at="blocks.1.ln2.hook_normalized")


def when(condition: Any, **more: Any) -> dict[str, Any]:
    return {**edit(), "when": condition, **more}


def refused(raw: object, saes: Any = ONE) -> tuple[str, str | None]:
    with pytest.raises(SteeringError) as error:
        parse_spec(raw, saes)
    assert len(error.value.message) < 250
    return error.value.code, error.value.param


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (when([]), "invalid_value", "steering.when"),
        (when({"any": []}), "invalid_value", "steering.when.any"),
        (when({"any": None}), "invalid_type", "steering.when.any"),
        (when({"any": [FIRES], "above": 1}), "unknown_field", "steering.when.above"),
        (when([{"any": [FIRES]}]), "unknown_field", "steering.when[0].any"),
        (when([FIRES] * 65), "invalid_value", "steering.when"),
        (when("sometimes"), "invalid_value", "steering.when"),
        (when(3), "invalid_type", "steering.when"),
        (when([FIRES, 3]), "invalid_type", "steering.when[1]"),
        (when({"above": 1}), "invalid_value", "steering.when.feature"),
        (when({"feature": 3}), "invalid_value", "steering.when.above"),
        (when({**FIRES, "below": 1}), "invalid_value", "steering.when.below"),
        (when({"any": [FIRES, {"feature": 3, "above": None}]}), "invalid_value",
         "steering.when.any[1].above"),
        (when({"feature": 3, "above": -0.1}), "invalid_value", "steering.when.above"),
        (when({"feature": 3, "below": float("inf")}), "invalid_value", "steering.when.below"),
        (when({"feature": 3, "above": 10**400}), "invalid_value", "steering.when.above"),
        (when({"feature": 3, "above": "1"}), "invalid_type", "steering.when.above"),
        (when({"feature": 3, "above": True}), "invalid_type", "steering.when.above"),
        (when({"feature": 3.0, "above": 1}), "invalid_type", "steering.when.feature"),
        (when({"feature": 10, "above": 1}), "feature_out_of_range", "steering.when.feature"),
        (when([FIRES, {**FIRES, "sae": "z"}]), "unknown_sae", "steering.when[1].sae"),
        (when({**FIRES, "unit": "percent"}), "invalid_value", "steering.when.unit"),
        (when({**FIRES, "scope": "ever"}), "invalid_value", "steering.when.scope"),
        (when({**FIRES, "scope": 1}), "invalid_type", "steering.when.scope"),
        (when({"feature": 7, "above": 1, "unit": "max_act"}), "max_act_unknown",
         "steering.when.unit"),
        (edit(when={"any": [{**FIRES, "feature": -1}]}), "feature_out_of_range",
         f"{HERE}.when.any[0].feature"),
        # of the whole prompt
        (when({**FIRES, "scope": "prompt"}), "invalid_value", "steering.when"),
        (edit(when=[{**FIRES, "scope": "prompt"}]), "invalid_value", f"{HERE}.when"),
        # stop_when
        ({"stop_when": []}, "invalid_value", "steering.stop_when"),
        ({"stop_when": {"feature": 3}}, "invalid_value", "steering.stop_when.above"),
        ({"stop_when": {**FIRES, "below": 1}}, "unknown_field", "steering.stop_when.below"),
        ({"stop_when": {**FIRES, "scope": "token"}}, "unknown_field", "steering.stop_when.scope"),
        ({"stop_when": [FIRES, {**FIRES, "feature": 99}]}, "feature_out_of_range",
         "steering.stop_when[1].feature"),
        ({"stop_when": {"feature": 5, "above": 1, "unit": "max_act"}}, "max_act_unknown",
         "steering.stop_when.unit"),
    ],
)  # fmt: skip
def test_a_wrong_condition_is_refused_with_its_code_and_path(
    raw: object, code: str, param: str
) -> None:
    assert refused(raw) == (code, param)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("above", 'field "above" does not go with the others here'),
        ("x", "known here: sae, feature"),
    ],
)
def test_a_field_of_another_shape_is_not_told_to_be_one_that_is_known_here(
    name: str, said: str
) -> None:
    with pytest.raises(SteeringError, match=said):
        parse_spec(when({"any": [FIRES], name: 1}), ONE)


def test_eight_distinct_conditions_are_the_most() -> None:
    seven = [{"feature": f, "above": 1} for f in range(7)]
    spec = parse_spec(when([*seven, *seven], stop_when={"feature": 0, "above": 1}), ONE)
    assert len(spec.gates) == 8  # a condition of an edit and one that stops are two
    eight = [*seven, {"feature": 7, "above": 1}]
    parse_spec(when(eight), ONE)
    assert refused(when([*eight, {"feature": 8, "above": 1}])) == ("invalid_value", "steering.when")
    assert refused(when(eight, stop_when=FIRES)) == ("invalid_value", "steering.stop_when")
    own = {**EDIT, "feature": 2, "when": {"feature": 0, "below": 1}}
    assert refused({"interventions": [EDIT, own], "when": eight}) == (
        "invalid_value",
        "steering.interventions[1].when",
    )


def test_own_conditions_replace_the_requests_and_always_lifts_them() -> None:
    own = {"feature": 4, "below": 1}
    items = [
        {**EDIT, "feature": i, **({"when": w} if w is not ... else {})}
        for i, w in enumerate([..., None, "always", own, {"any": [own]}])
    ]
    spec = parse_spec({"interventions": items, "when": FIRES}, ONE)
    requests = When((Condition("a", 3, "above", 0.5, "token"),), False, "")
    owns = When((Condition("a", 4, "below", 1.0, "token"),), False, "")
    assert [made.when for made in spec.edits] == [requests, requests, None, owns, owns]
    assert parse_spec(when("always"), ONE) == parse_spec(edit(), ONE)


@pytest.mark.parametrize("unit", ["raw", "max_act"])
@pytest.mark.parametrize("bound", [1e39, 1.7e308])
def test_bound_past_float32_is_its_largest_number(unit: str, bound: float) -> None:
    largest = float(np.finfo(np.float32).max)
    condition = {"feature": 3, "above": bound, "unit": unit}
    spec = parse_spec(when(condition, stop_when=condition), ONE)
    assert [gate.threshold for gate in spec.gates] == [largest, largest]
    spec = parse_spec(when({"feature": 3, "below": bound, "unit": unit}), ONE)
    assert [gate.threshold for gate in spec.gates] == [largest]


def test_unit_of_a_condition_is_resolved() -> None:
    spec = parse_spec(when({"feature": 3, "above": 2, "unit": "max_act"}), ONE)
    assert spec.gates == (Condition("a", 3, "above", 5.0, "token"),)


@pytest.mark.parametrize("edited", range(len(PLACES)))
@pytest.mark.parametrize("read", range(len(PLACES)))
@pytest.mark.parametrize("scope", ["token", "so_far", "prompt"])
def test_condition_must_be_read_before_the_edit_is_made(edited: int, read: int, scope: str) -> None:
    raw = {
        "interventions": [{**EDIT, "sae": f"s{edited}"}],
        "positions": GENERATION,
        "when": {**FIRES, "sae": f"s{read}", "scope": scope},
    }
    if read > edited and scope != "prompt":
        assert refused(raw, SAES) == ("condition_too_late", "steering.when")
    else:
        parse_spec(raw, SAES)


def test_transcoders_condition_is_read_where_it_reads_and_its_edit_made_where_it_writes() -> None:
    saes = {"t": TRANSCODER, "mid": SAES["s3"], "post": SAES["s5"]}

    def raw(edited: str, read: str) -> dict[str, Any]:
        return {"interventions": [{**EDIT, "sae": edited}], "when": {**FIRES, "sae": read}}

    for edited, read in [("t", "t"), ("t", "mid"), ("post", "t")]:
        parse_spec(raw(edited, read), saes)
    assert refused(raw("mid", "t"), saes)[0] == "condition_too_late"
    assert refused(raw("t", "post"), saes)[0] == "condition_too_late"


def test_condition_must_be_known_at_the_first_of_several_places_where_an_edit_is_added() -> None:
    clt = Facts(
        "blocks.1.hook_mlp_out",
        affine=False,
        read_at="blocks.1.hook_resid_mid",
        also_at=("blocks.2.hook_mlp_out",),
    )
    saes = {"clt": clt, "mid": SAES["s3"], "between": SAES["s6"]}

    def raw(edited: str, read: str) -> dict[str, Any]:
        return {"interventions": [{**EDIT, "sae": edited}], "when": {**FIRES, "sae": read}}

    for edited, read in [("clt", "clt"), ("clt", "mid"), ("between", "clt")]:
        parse_spec(raw(edited, read), saes)
    assert refused(raw("clt", "between"), saes) == ("condition_too_late", "steering.when")


def test_conditions_on_another_pipeline_stage_are_refused() -> None:
    def check(edited: str, condition: Any) -> None:
        raw = {"interventions": [{**EDIT, "sae": edited}], "when": condition}
        spec = parse_spec(raw, SAES)
        edits = [(made.sae, made.when) for made in spec.edits]
        refuse_across_stages(edits, SAES, lambda hook: int(HookPoint.parse(hook).layer >= 2))

    check("s5", {**FIRES, "sae": "s0"})
    check("s7", {**FIRES, "sae": "s6"})
    check("s7", "always")
    with pytest.raises(SteeringError, match="different pipeline stages") as error:
        check("s6", [{**FIRES, "sae": "s6"}, {**FIRES, "sae": "s5"}])
    assert (error.value.code, error.value.param) == ("unsupported_combination", "steering.when")


def test_every_hook_point_has_its_place_in_the_pass() -> None:
    from sae.card import HOOK_KINDS

    places = [place_in_pass(hook) for hook in PLACES]
    assert places == sorted(set(places))
    assert len({place_in_pass(f"blocks.0.{kind}") for kind in HOOK_KINDS}) == len(HOOK_KINDS)


def test_stop_when_needs_no_intervention() -> None:
    spec = parse_spec({"stop_when": [FIRES, FIRES, {**FIRES, "above": 0}]}, ONE)
    assert spec.edits == ()
    assert [condition.threshold for condition in spec.stop_when] == [0.0, 0.5]
    assert spec.all_saes == ("a",)


# Sharing


def salt(raw: object, prompt_len: int = 10, saes: Any = ONE) -> str | None:
    return cache_salt(parse_spec(raw, saes), dict.fromkeys(saes, "0"), prompt_len, None)


OTHER = {"feature": 4, "below": 1}


@pytest.mark.parametrize(
    "raw",
    [
        when([FIRES, OTHER]),
        when([OTHER, FIRES, OTHER]),
        when([{**FIRES, "sae": "a", "scope": "token", "unit": "raw"}, OTHER]),
        when([{"feature": 3, "above": 0.2, "unit": "max_act"}, OTHER]),
        edit(when=[OTHER, FIRES]),
        {**edit(when=[OTHER, FIRES]), "when": {"feature": 0, "above": 9}},
        when([FIRES, OTHER], stop_when=FIRES, report=True),
    ],
)
def test_equal_conditions_share(raw: dict[str, Any]) -> None:
    assert salt(raw) == salt(when([FIRES, OTHER]))


@pytest.mark.parametrize(
    "raw",
    [
        edit(),
        when(FIRES),
        when({"any": [FIRES, OTHER]}),
        when([{**FIRES, "above": 0.25}, OTHER]),
        when([{"feature": 3, "below": 0.5}, OTHER]),
        when([{**FIRES, "scope": "so_far"}, OTHER]),
    ],
)
def test_other_conditions_do_not(raw: dict[str, Any]) -> None:
    assert salt(raw) != salt(when([FIRES, OTHER]))


def test_any_of_one_condition_is_all_of_it() -> None:
    assert salt(when({"any": [FIRES, FIRES]})) == salt(when(FIRES))


def test_stopping_alone_shares_with_unsteered_requests() -> None:
    assert salt({"stop_when": FIRES}) is None
    assert salt({**edit(), "stop_when": FIRES}) == salt(edit())


def test_weights_that_decide_are_part_of_the_salt() -> None:
    spec = parse_spec(edit(sae="s3", when={**FIRES, "sae": "s1"}), SAES)
    assert spec.kv_saes == ("s3", "s1")
    sums: dict[str, str] = dict.fromkeys(SAES, "0")
    assert cache_salt(spec, sums, 9, None) != cache_salt(spec, {**sums, "s1": "1"}, 9, None)


def test_request_whose_prompt_decides_reads_no_cached_block() -> None:
    positions = {"positions": GENERATION}
    for scope, skips in (("token", False), ("so_far", True), ("prompt", True)):
        spec = parse_spec(when({**FIRES, "scope": scope}, **positions), ONE)
        assert spec.skips_prefix_cache is skips
    assert parse_spec({"read": {}}, ONE).skips_prefix_cache
    assert not parse_spec({"stop_when": FIRES}, ONE).skips_prefix_cache


def test_prompts_length_counts_where_the_prompt_decides() -> None:
    prompt = when({**FIRES, "scope": "prompt"}, positions=GENERATION)
    assert salt(prompt, 10) != salt(prompt, 11)
    so_far = when({**FIRES, "scope": "so_far"})
    assert salt(so_far, 10) == salt(so_far, 11)
