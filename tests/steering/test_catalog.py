"""The SAEs as requests see them, where their files change while they are served."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sae.source import ResolvedSAE
from steering import catalog as catalog_module
from steering.catalog import Catalog
from steering.config import SteeringConfig
from steering.errors import SteeringError
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_sae

EDIT = {"interventions": [{"sae": "a", "feature": 3, "op": "ablate"}]}
READ = {"read": {"sae": "a"}}
OTHER = {"interventions": [{"sae": "b", "feature": 3, "op": "ablate"}], "read": {"sae": "b"}}


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    saes = tuple(
        ResolvedSAE(name, str(path), path=str(path))
        for name in ("a", "b")
        for path in [make_tiny_sae(tmp_path / name)]
    )
    return Catalog.from_config(SteeringConfig(saes, D_MODEL, NUM_LAYERS))


@pytest.mark.parametrize("field", [EDIT, READ, {**OTHER, **READ}])
async def test_request_for_an_sae_whose_file_changed_is_refused(
    catalog: Catalog, tmp_path: Path, field: dict[str, Any]
) -> None:
    spec, other = catalog.parse(field), catalog.parse(OTHER)
    catalog.prepare_now(spec)
    os.truncate(tmp_path / "a" / "sae_weights.safetensors", 4096)
    with pytest.raises(SteeringError, match="SAE 'a' changed on disk") as refused:
        catalog.prepare_now(spec)
    assert (refused.value.code, refused.value.param) == ("invalid_weights", "steering")
    assert str(tmp_path) not in refused.value.message
    with pytest.raises(SteeringError, match="changed on disk"):
        await catalog.prepare(spec)
    await catalog.prepare(other)


async def test_sae_whose_file_was_deleted_is_served_as_it_was(
    catalog: Catalog, tmp_path: Path
) -> None:
    (tmp_path / "a" / "sae_weights.safetensors").unlink()
    spec = catalog.parse(EDIT)
    await catalog.prepare(spec)
    assert len(catalog.prepare_now(spec)["a"]) == 64


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """SAEs that are too large to be scanned at start; feature 5 of "b", a TopK SAE, is damaged."""
    monkeypatch.setattr(catalog_module, "SCAN_LIMIT_BYTES", 0)
    paths = {
        "a": make_tiny_sae(tmp_path / "a"),
        "b": make_tiny_sae(tmp_path / "b", architecture="topk"),
        "c": make_tiny_sae(tmp_path / "c"),
    }
    for name in ("b", "c"):
        file = paths[name] / "sae_weights.safetensors"
        weights = load_file(file)
        weights["W_dec"][5, 0] = float("nan")
        save_file(weights, file)
    saes = tuple(ResolvedSAE(name, str(path), path=str(path)) for name, path in paths.items())
    return Catalog.from_config(SteeringConfig(saes, D_MODEL, NUM_LAYERS))


def one(sae: str, feature: int) -> dict[str, Any]:
    return {"interventions": [{"sae": sae, "feature": feature, "op": "ablate"}]}


@pytest.mark.parametrize(
    ("field", "param"),
    [
        (one("c", 5), "steering.interventions[0].feature"),
        ({**one("c", 3), "error_term": False}, "steering.error_term"),
        ({"read": {"sae": "c"}}, "steering.read"),
        (one("b", 3), "steering.interventions[0].sae"),
    ],
    ids=["its row", "a reconstruction", "a read", "a TopK"],
)
async def test_damaged_row_of_a_large_sae_is_refused_when_it_is_first_used(
    large: Catalog, field: dict[str, Any], param: str
) -> None:
    spec = large.parse(field)
    for _ in range(2):
        with pytest.raises(SteeringError, match="not finite") as refused:
            await large.prepare(spec)
        assert (refused.value.code, refused.value.param) == ("invalid_weights", param)


@pytest.mark.parametrize(
    "field", [one("c", 3), {**one("a", 5), "error_term": False}, {"read": {"sae": "a"}}]
)
async def test_damaged_row_of_a_large_sae_disturbs_nobody_who_does_not_use_it(
    large: Catalog, field: dict[str, Any]
) -> None:
    await large.prepare(large.parse(field))
