"""The SAEs as requests see them, where their files change while they are served."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from sae.source import ResolvedSAE
from steering.config import SteeringConfig
from steering.errors import SteeringError
from steering.request import catalog as catalog_module
from steering.request.catalog import Catalog
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_sae
from tests.sae.suites import write_llama_scope

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
    assert len(catalog.prepare_now(spec).fingerprints["a"]) == 64


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
        ({**one("a", 3), "when": {"sae": "c", "feature": 5, "above": 1}}, "steering.when"),
        ({**one("a", 3), "when": {"sae": "b", "feature": 3, "above": 1}}, "steering.when"),
        ({"stop_when": {"sae": "c", "feature": 5, "above": 1}}, "steering.stop_when"),
        ({**one("c", 3), "protect": [{"sae": "c", "feature": 5}]}, "steering.protect[0]"),
    ],
    ids=[
        *("its row", "a reconstruction", "a read", "a TopK"),
        *("a condition", "a TopK condition", "a stop", "a protected one"),
    ],
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


# Edits that are solved


@pytest.fixture
def solvable(tmp_path: Path) -> Catalog:
    """Features 0 and 1 write what they read and are nearly one; feature 2 writes its opposite."""
    path = make_tiny_sae(tmp_path / "a")
    file = path / "sae_weights.safetensors"
    weights = load_file(file)
    rows = weights["W_enc"].T.contiguous()
    rows[1] = rows[0] + 1e-4 * rows[3]
    weights["W_enc"] = rows.T.contiguous()
    weights["W_dec"][:5] = rows[:5]
    weights["W_dec"][2] *= -1
    save_file(weights, file)
    saes = (ResolvedSAE("a", str(path), path=str(path)),)
    return Catalog.from_config(SteeringConfig(saes, D_MODEL, NUM_LAYERS))


def reread(*features: int, **more: Any) -> dict[str, Any]:
    edits = [{"feature": feature, "op": "ablate"} for feature in features]
    return {"interventions": edits, "match": "reread", **more}


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (reread(2), "moves it by only"),
        (reread(0, 1), "condition number"),
        (reread(0, protect=[{"feature": 1}]), "moves it by only"),
    ],
    ids=["gain", "condition", "protected"],
)
async def test_edits_that_cannot_be_solved_are_refused(
    solvable: Catalog, field: dict[str, Any], said: str
) -> None:
    spec = solvable.parse(field)
    for _ in range(2):
        with pytest.raises(SteeringError, match=said) as refused:
            await solvable.prepare(spec)
        assert (refused.value.code, refused.value.param) == ("ill_conditioned", "steering.match")


@pytest.mark.parametrize(
    "field",
    [
        reread(0),
        reread(0, 3),
        reread(1, protect=[{"feature": 4}]),
        {**reread(2), "match": "delta"},
        {**reread(0, protect=[{"feature": 1}]), "match": "delta"},
    ],
)
async def test_edits_that_can_be_solved_are_prepared(
    solvable: Catalog, field: dict[str, Any]
) -> None:
    for _ in range(2):
        await solvable.prepare(solvable.parse(field))


async def test_report_says_what_edits_keep_beside_protected_features(solvable: Catalog) -> None:
    rows = solvable.sae("a").rows([0, 3, 4, 5])
    encoder, decoder = rows.W_enc.double().numpy(), rows.W_dec.double().numpy()
    beside = encoder[2:].T
    new = decoder[:2].T - beside @ np.linalg.lstsq(beside, decoder[:2].T, rcond=None)[0]
    norm = np.linalg.norm(new, axis=0) / np.linalg.norm(decoder[:2], axis=1)
    gain = np.einsum("id,di->i", encoder[:2], new) / np.einsum("id,id->i", encoder, decoder)[:2]
    protect = [{"feature": 4}, {"feature": 5}]
    for match in ("delta", "reread"):
        field = {**reread(0, 3, protect=protect), "match": match}
        assert (await solvable.prepare(solvable.parse(field))).protected is None
        prepared = await solvable.prepare(solvable.parse({**field, "report": True}))
        assert prepared.protected is not None
        assert prepared.protected.keys() == {"norm_kept", "gain_kept"}
        assert prepared.protected["norm_kept"] == pytest.approx(norm.mean())
        assert prepared.protected["gain_kept"] == pytest.approx(gain.mean())
    plain = await solvable.prepare(solvable.parse({**reread(0), "report": True}))
    assert plain.protected is None


@pytest.mark.parametrize("architecture", ["gated", "topk"])
def test_what_is_not_affine_cannot_be_solved(tmp_path: Path, architecture: str) -> None:
    path = make_tiny_sae(tmp_path / "a", architecture=architecture)
    saes = (ResolvedSAE("a", str(path), path=str(path)),)
    catalog = Catalog.from_config(SteeringConfig(saes, D_MODEL, NUM_LAYERS))
    with pytest.raises(SteeringError) as refused:
        catalog.parse(reread(0))
    assert (refused.value.code, refused.value.param) == ("unsupported_op", "steering.match")


# What a restart may change


def fingerprint(tmp_path: Path, folder: str = "one", **changes: Any) -> str:
    """Of an SAE that is opened anew."""
    config = {k: changes.pop(k) for k in ("special_token_ids",) if k in changes}
    reference = {k: changes.pop(k) for k in ("sink_norm",) if k in changes}
    path = make_tiny_sae(tmp_path / folder, **changes)
    saes = (ResolvedSAE("a", str(path), path=str(path), **reference),)
    catalog = Catalog.from_config(SteeringConfig(saes, D_MODEL, NUM_LAYERS, **config))
    return catalog.prepare_now(catalog.parse(EDIT)).fingerprints["a"]


def test_what_a_restart_changes_of_an_sae_parts_requests(tmp_path: Path) -> None:
    found = {
        fingerprint(tmp_path),
        fingerprint(tmp_path, sink_norm=9.0),
        fingerprint(tmp_path, sink_norm=10.0),
        fingerprint(tmp_path, layer=0),
        fingerprint(tmp_path, special_token_ids=(1, 2)),
        fingerprint(tmp_path, special_token_ids=(1,)),
        fingerprint(tmp_path, config={"apply_b_dec_to_input": False}),
        fingerprint(tmp_path, config={"normalize_activations": "layer_norm"}),
        fingerprint(tmp_path, seed=1),
    }
    assert len(found) == 9


def test_what_only_a_configuration_says_of_an_sae_parts_requests(tmp_path: Path) -> None:
    def of_llama_scope(folder: str, **changes: Any) -> str:
        path = write_llama_scope(tmp_path / folder, **changes)
        saes = (ResolvedSAE("a", str(path), path=str(path)),)
        catalog = Catalog.from_config(SteeringConfig(saes, D_MODEL, NUM_LAYERS))
        return catalog.prepare_now(catalog.parse(EDIT)).fingerprints["a"]

    centered = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    found = {
        fingerprint(tmp_path),
        fingerprint(tmp_path, config=centered),
        of_llama_scope("plain"),
        of_llama_scope("threshold", jump_relu_threshold=0.8),
        of_llama_scope("norm", sparsity_include_decoder_norm=True),
        of_llama_scope("scale", dataset_average_activation_norm={"in": 8.0, "out": 8.0}),
    }
    assert len(found) == 6
    assert of_llama_scope("plain again") in found


def test_labels_part_no_requests(tmp_path: Path) -> None:
    labels = [{"index": 1, "label": "rain", "max_activation": 2.0}]
    assert fingerprint(tmp_path) == fingerprint(tmp_path, "two", features=labels)
