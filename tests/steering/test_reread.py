"""Where `match: "reread"` and `protect` are refused, and what else may share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steering.errors import SteeringError
from steering.request.cache_salt import cache_salt
from steering.request.parse import parse_spec
from tests.steering.specs import EDIT, ONE, Facts, edit

FIRES = {"feature": 3, "above": 0.5}
SAES = {
    "a": Facts(),
    "b": Facts(),
    "later": Facts("blocks.2.hook_resid_post"),
    "topk": Facts("blocks.3.hook_resid_post", affine=False),
    "direction": Facts("blocks.4.hook_resid_post", error_term=False),
    "clt": Facts(
        "blocks.0.hook_mlp_out",
        error_term=False,
        affine=False,
        read_at="blocks.0.hook_resid_mid",
        also_at=("blocks.1.hook_resid_post",),
    ),
}
MATCH = "steering.match"


def request(*edits: dict[str, Any], **more: Any) -> dict[str, Any]:
    items = [{**EDIT, "sae": "a", "feature": i, **changes} for i, changes in enumerate(edits)]
    return {"interventions": items, **more}


def reread(*edits: dict[str, Any], **more: Any) -> dict[str, Any]:
    return request(*edits, match="reread", **more)


def protect(*features: Any, edits: tuple[dict[str, Any], ...] = ({},), **more: Any) -> Any:
    return request(*edits, protect=list(features), **more)


FREE = {"sae": "a", "feature": 9}


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (reread({"sae": "topk"}), "unsupported_op", MATCH),
        (reread({}, {"sae": "topk"}), "unsupported_op", MATCH),
        (reread({"sae": "clt"}), "unsupported_op", MATCH),
        (reread({}, {"sae": "clt"}), "unsupported_combination", MATCH),
        (reread({}, error_term=False), "unsupported_op", MATCH),
        (reread({}, {"sae": "b"}), "unsupported_combination", MATCH),
        (reread({}, {"positions": {"prompt": False}}), "unsupported_combination", MATCH),
        (reread({}, {"positions": {"start": 2}}), "unsupported_combination", MATCH),
        (reread({}, {"when": {**FIRES, "sae": "a"}}), "unsupported_combination", MATCH),
        (request({}, match="both"), "invalid_value", MATCH),
        (request({}, match=1), "invalid_type", MATCH),
        (protect(), "invalid_value", "steering.protect"),
        (protect(*[FREE] * 65), "invalid_value", "steering.protect"),
        (protect({"feature": 9}), "sae_required", "steering.protect[0].sae"),
        (protect({**FREE, "sae": "z"}), "unknown_sae", "steering.protect[0].sae"),
        (protect(FREE, {**FREE, "feature": 10}), "feature_out_of_range",
         "steering.protect[1].feature"),
        (protect({**FREE, "op": "ablate"}), "unknown_field", "steering.protect[0].op"),
        (protect({"sae": "a"}), "invalid_value", "steering.protect[0].feature"),
        (protect(FREE, {**FREE, "sae": "later"}), "invalid_value", "steering.protect[1]"),
        (protect({**FREE, "feature": 0}), "unsupported_combination", "steering.protect[0]"),
        (protect({**FREE, "sae": "topk"}, edits=({"sae": "topk"},)), "unsupported_op",
         "steering.protect[0]"),
        (protect(FREE, error_term=False), "unsupported_op", "steering.protect[0]"),
        (protect(FREE, edits=({}, {"sae": "b"})), "unsupported_combination",
         "steering.protect[0]"),
        (protect(FREE, edits=({}, {"sae": "clt"})), "unsupported_combination",
         "steering.protect[0]"),
        (protect({**FREE, "sae": "clt"}, edits=({"sae": "clt"},)), "unsupported_op",
         "steering.protect[0]"),
        ({"read": {"sae": "a"}, "protect": [FREE]}, "invalid_value", "steering.protect[0]"),
        (request({}, max_share=0), "invalid_value", "steering.max_share"),
        (request({}, max_share=10.5), "invalid_value", "steering.max_share"),
        (request({}, max_share=float("nan")), "invalid_value", "steering.max_share"),
        (request({}, max_share="1"), "invalid_type", "steering.max_share"),
        (request({"sae": "direction"}, error_term=False), "unsupported_op",
         "steering.error_term"),
        (request({}, {"sae": "clt"}, error_term=False), "unsupported_op",
         "steering.error_term"),
    ],
)  # fmt: skip
def test_what_cannot_be_solved_is_refused_with_its_code_and_path(
    raw: object, code: str, param: str
) -> None:
    with pytest.raises(SteeringError) as refused:
        parse_spec(raw, SAES)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert len(refused.value.message) < 200


@pytest.mark.parametrize(
    "raw",
    [
        reread({}, {}),
        reread({"sae": "direction"}),
        reread({}, {"sae": "later", "positions": {"prompt": False}}),
        reread({}, {"when": [{**FIRES, "sae": "a"}]}, when={**FIRES, "sae": "a"}),
        reread({}, {"positions": {"start": 0}}),
        protect(FREE, FREE, edits=({}, {"sae": "topk", "positions": {"prompt": False}})),
        protect(FREE, match="reread", max_share=10),
        request({}, match=None, protect=None, max_share=None),
    ],
)
def test_what_can_be_solved_is_taken(raw: object) -> None:
    parse_spec(raw, SAES)


def test_fields_are_kept() -> None:
    spec = parse_spec(protect(FREE, FREE, match="reread", max_share=1), SAES)
    assert (spec.reread, spec.protect, spec.max_share) == (True, (("a", 9),), 1.0)
    plain = parse_spec(request({}, match="delta"), SAES)
    assert (plain.reread, plain.protect, plain.max_share) == (False, (), None)


def salt(raw: object) -> str | None:
    return cache_salt(parse_spec(raw, SAES), dict.fromkeys(SAES, "0"), 10, None)


def test_match_protect_and_max_share_part_requests() -> None:
    other = {**FREE, "feature": 8}
    different = [
        request({}),
        reread({}),
        protect(FREE),
        protect(other),
        protect(FREE, other),
        protect(FREE, match="reread"),
        request({}, max_share=1),
        request({}, max_share=2),
    ]
    assert len({salt(raw) for raw in different}) == len(different)
    assert salt(protect(FREE, other)) == salt(protect(other, FREE, other))
    assert salt(request({}, match="delta", max_share=1)) == salt(request({}, max_share=1.0))


def test_request_without_edits_shares_with_unsteered_ones_whatever_else_it_says() -> None:
    spec = parse_spec({"read": {}, "match": "reread", "max_share": 1, "when": FIRES}, ONE)
    assert cache_salt(spec, {}, 10, None) is None
    assert cache_salt(replace(spec, read=None), {}, 10, "mine") == "mine"


def test_field_that_does_nothing_is_taken_only_where_it_may() -> None:
    fields: list[dict[str, Any]] = [
        {"interventions": []},
        {},
        {"interventions": None, "when": FIRES},
    ]
    for raw in fields:
        assert parse_spec(raw, ONE, empty_allowed=True).edits == ()
        with pytest.raises(SteeringError) as refused:
            parse_spec(raw, ONE)
        assert refused.value.param == "steering.interventions"
    with pytest.raises(SteeringError):
        parse_spec({**edit(op="set")}, ONE, empty_allowed=True)
