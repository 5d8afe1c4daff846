"""The SAEs as requests see them, where their files change while they are served."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sae.source import SAEReference
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
        SAEReference(name, str(path), path=str(path))
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
