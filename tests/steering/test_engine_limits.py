"""What an engine, the way it is served, refuses."""

from __future__ import annotations

from typing import Any

import pytest

from sae.source import ResolvedSAE
from steering.config import SteeringConfig
from steering.errors import SteeringError
from steering.request.catalog import Catalog
from steering.request.engine_limits import EngineLimits
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_sae

STOP = {"stop_when": {"sae": "late", "feature": 3, "above": 1}}
STREAMED = {"read": {"sae": "late", "stream": True}}


@pytest.fixture
def catalog_of(tmp_path: Any) -> Any:
    """A catalog of SAEs at the first and the last layer, of an engine with these limits."""
    layers = {"early": 0, "late": NUM_LAYERS - 1}
    saes = tuple(
        ResolvedSAE(name, str(path), path=str(path))
        for name, layer in layers.items()
        for path in (make_tiny_sae(tmp_path / name, layer=layer),)
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
