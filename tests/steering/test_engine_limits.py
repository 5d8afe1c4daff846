"""What an engine, the way it is served, refuses."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.platforms import current_platform

from sae.source import ResolvedSAE
from steering.config import RESIDENT_CHOICES, RESIDENT_NONE, SteeringConfig
from steering.errors import SteeringError
from steering.request.catalog import Catalog
from steering.request.engine_limits import EngineLimits
from steering.request.planning import make_plan
from steering.vllm.door import limits_of
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_sae

STOP = {"stop_when": {"sae": "late", "feature": 3, "above": 1}}
STREAMED = {"read": {"sae": "late", "stream": True}}


@pytest.fixture
def catalog_of(tmp_path: Any) -> Any:
    """A catalog of SAEs at the first and the last layer, of an engine with these limits."""
    kinds: dict[str, dict[str, Any]] = {
        "early": {"layer": 0},
        "late": {"layer": NUM_LAYERS - 1},
        "topk": {"layer": 0, "architecture": "topk"},
    }
    saes = tuple(
        ResolvedSAE(name, str(path), path=str(path))
        for name, kind in kinds.items()
        for path in (make_tiny_sae(tmp_path / name, **kind),)
    )
    return lambda limits: Catalog.from_config(
        SteeringConfig(saes, D_MODEL, NUM_LAYERS), limits=limits
    )


def test_stop_when_is_refused_beside_speculation_and_a_read_is_not(catalog_of: Any) -> None:
    catalog = catalog_of(EngineLimits(speculates=True))
    with pytest.raises(SteeringError) as refused:
        catalog.parse(STOP)
    assert (refused.value.code, refused.value.param) == (
        "unsupported_combination",
        "steering.stop_when",
    )
    assert catalog.parse(STREAMED).read.stream


@pytest.mark.parametrize("field", ["stop_when", "read"])
def test_only_the_last_pipeline_stage_may_stop_or_stream(catalog_of: Any, field: str) -> None:
    whole = {**STOP, **STREAMED}
    catalog = catalog_of(EngineLimits(first_layers=(0, NUM_LAYERS - 1)))
    catalog.parse({field: whole[field]})
    catalog_of(EngineLimits()).parse({field: {**whole[field], "sae": "early"}})
    with pytest.raises(SteeringError, match=r"not on the last pipeline stage") as refused:
        catalog.parse({field: {**whole[field], "sae": "early"}})
    assert refused.value.code == "unsupported_combination"
    assert refused.value.param in ("steering.stop_when", "steering.read.stream")


ROW = {"sae": "late", "feature": 3, "op": "clamp", "value": 1}
EXACT = {"sae": "topk", "feature": 3, "op": "clamp", "value": 1}
IF_EXACT = {"sae": "topk", "feature": 3, "above": 1}


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"read": {"sae": "late"}}, "steering.read"),
        ({"interventions": [ROW], "error_term": False}, "steering.error_term"),
        ({"interventions": [ROW, EXACT]}, "steering.interventions[1].sae"),
        ({"interventions": [{**EXACT, "op": "add"}], "report": True},
         "steering.interventions[0].sae"),
        ({"interventions": [{**ROW, "when": IF_EXACT}]}, "steering.interventions[0].when"),
        ({"stop_when": IF_EXACT}, "steering.stop_when"),
    ],
)  # fmt: skip
def test_what_needs_all_of_an_sae_is_refused_where_the_gpu_holds_none(
    catalog_of: Any, field: dict[str, Any], param: str
) -> None:
    catalog_of(EngineLimits()).parse(field)
    with pytest.raises(SteeringError, match=r"needs all of SAE .* --steering-resident") as refused:
        catalog_of(EngineLimits(holds_none=True)).parse(field)
    assert (refused.value.code, refused.value.param) == ("unsupported_combination", param)


def test_what_needs_rows_alone_is_served_where_the_gpu_holds_none(catalog_of: Any) -> None:
    catalog = catalog_of(EngineLimits(holds_none=True))
    added = {**EXACT, "op": "add"}
    when = {"sae": "early", "feature": 1, "above": 0}
    catalog.parse({"interventions": [{**ROW, "when": when}, added], "stop_when": when})


def test_a_field_is_refused_there_if_its_plan_encodes_an_sae(catalog_of: Any) -> None:
    # What is refused is told from the field, before there is a plan; what is done, from the plan.
    anywhere, there = catalog_of(EngineLimits()), catalog_of(EngineLimits(holds_none=True))
    index = {"early": 0, "late": 1, "topk": 2}
    edits = (ROW, {**EXACT, "op": "add"}, {**EXACT, "feature": 4}, {**ROW, "when": IF_EXACT})
    several = [*(list(some) for n in (1, 2) for some in combinations(edits, n))]
    refusals = []
    others: list[dict[str, Any]] = [{}, {"read": {"sae": "late"}}, {"stop_when": IF_EXACT}]
    for interventions, error_term, report, more in product(
        several, (True, False), (True, False), others
    ):
        field = {"interventions": interventions, "error_term": error_term, "report": report, **more}
        try:
            spec = anywhere.parse(field)
        except SteeringError:
            continue  # one feature twice, or a condition that is not read before its edit
        plan = make_plan(spec, index, "key", 1, 3)
        encodes = plan.encoded(lambda sae: sae != index["topk"])
        try:
            there.parse(field)
            refused = False
        except SteeringError as error:
            refused = True
            assert any(f"SAE {name!r}" in str(error) for name in index if index[name] in encodes)
        assert refused == bool(encodes), field
        refusals.append(refused)
    assert {*refusals} == {True, False} and len(refusals) > 50


async def test_a_study_that_encodes_an_sae_is_refused_where_the_gpu_holds_none(
    catalog_of: Any,
) -> None:
    await catalog_of(EngineLimits()).prepare_whole("late")
    with pytest.raises(SteeringError, match="needs all of SAE 'late'"):
        await catalog_of(EngineLimits(holds_none=True)).prepare_whole("late")


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("resident", RESIDENT_CHOICES)
def test_only_a_gpu_that_is_told_so_holds_none(
    monkeypatch: pytest.MonkeyPatch, resident: str, on_gpu: bool
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: on_gpu)
    config = SteeringConfig((), D_MODEL, NUM_LAYERS, resident=resident)
    engine = SimpleNamespace(
        additional_config={"steering": config.to_dict()},
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        speculative_config=None,
    )
    assert limits_of(engine).holds_none == (on_gpu and resident == RESIDENT_NONE)
