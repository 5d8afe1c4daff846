"""SAELens files, against SAELens' own classes in float32."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.sae import SAE, open_sae
from sae.source import SAEReference
from tests.sae.oracles import assert_same_sae, oracle
from tests.sae.suites import (
    D_IN,
    D_SAE,
    HOOK,
    inputs,
    sae_lens_config,
    sae_lens_tensors,
    weights,
    write_sae_lens,
)

ARCHITECTURES = ("standard", "jumprelu", "gated", "topk", "abstopk")
NORMALIZATIONS = (
    "none",
    "layer_norm",
    "constant_norm_rescale",
    "expected_average_only_in",
    "covariance_whitening",
)


def load_oracle(folder: Path) -> Any:
    sae_lens = oracle("sae_lens", "sae-lens")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sae_lens.SAE.load_from_disk(str(folder), device="cpu", dtype="float32")


def assert_agrees(mine: SAE, theirs: Any) -> None:
    with torch.no_grad():
        # Its run-time normalisation keeps state between encode and decode.
        assert_same_sae(mine, theirs.encode, lambda f, x: theirs.decode(theirs.encode(x) * 0 + f))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_agrees_with_sae_lens(
    tmp_path: Path,
    load: Callable[..., SAE],
    architecture: str,
    normalize: str,
    apply_b_dec_to_input: bool,
) -> None:
    config = sae_lens_config(
        architecture,
        normalize_activations=normalize,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    folder = write_sae_lens(tmp_path, architecture, config=config)
    assert_agrees(load(folder), load_oracle(folder))


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_agrees_where_activations_are_rescaled_by_decoder_norm(
    tmp_path: Path, load: Callable[..., SAE], architecture: str
) -> None:
    config = sae_lens_config(architecture, rescale_acts_by_decoder_norm=True)
    folder = write_sae_lens(tmp_path, architecture, config=config)
    sae = load(folder)
    assert sae.card.activation_unit == "activation_times_decoder_norm"
    assert_agrees(sae, load_oracle(folder))


def test_agrees_on_what_sae_lens_itself_saves(tmp_path: Path, load: Callable[..., SAE]) -> None:
    sae_lens = oracle("sae_lens", "sae-lens")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=HOOK)
    saved = sae_lens.JumpReLUSAE(
        sae_lens.JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, metadata=metadata)
    )
    canonical = weights(seed=4)
    saved.load_state_dict(
        sae_lens_tensors("jumprelu", seed=4) | {"threshold": canonical["threshold"]}
    )
    saved.save_model(tmp_path)
    assert_agrees(load(tmp_path), saved)


OLD_CONFIG: dict[str, Any] = {
    "model_name": "gpt2-small",
    "hook_point": HOOK,
    "hook_point_layer": 3,
    "hook_point_head_index": None,
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("standard", {}),
        ("standard", {"normalize_activations": False}),
        ("standard", {"normalize_activations": True}),
        ("standard", {"normalize_activations": None, "apply_b_dec_to_input": False}),
        ("jumprelu", {"architecture": "jumprelu", "hook_name": HOOK, "hook_layer": 3}),
        ("gated", {"architecture": "gated"}),
        ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}),
        ("topk", {"architecture": "standard", "activation_fn": "topk",
                  "activation_fn_kwargs": {"k": 4}}),
        ("topk", {"architecture": "topk", "activation_fn_kwargs": {"k": 4}}),
        ("topk", {"architecture": "topk", "activation_fn": "relu", "k": 5,
                  "activation_fn_kwargs": {"k": 4}}),
    ],
)  # fmt: skip
def test_configurations_older_than_v6_agree(
    tmp_path: Path, load: Callable[..., SAE], architecture: str, changes: dict[str, Any]
) -> None:
    folder = write_sae_lens(tmp_path, architecture, config=OLD_CONFIG | changes)
    sae = load(folder)
    assert (sae.card.architecture, sae.card.hook) == (architecture, HOOK)
    assert_agrees(sae, load_oracle(folder))


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("blocks.3.hook_in", "blocks.3.hook_resid_pre"),
        ("blocks.3.hook_out", "blocks.3.hook_resid_post"),
        ("blocks.3.mlp.hook_out", "blocks.3.mlp.hook_out"),
        ("blocks.3.attn.hook_out", "blocks.3.attn.hook_out"),
    ],
)
def test_names_of_the_bridge_are_the_same_places(
    tmp_path: Path, load: Callable[..., SAE], name: str, hook: str
) -> None:
    config = sae_lens_config(metadata={"sae_lens_version": "6.54.0", "hook_name": name})
    assert load(write_sae_lens(tmp_path, config=config)).card.hook == hook


def test_trivial_finetuning_factor_is_accepted(tmp_path: Path, load: Callable[..., SAE]) -> None:
    tensors = sae_lens_tensors("standard") | {"scaling_factor": torch.ones(D_SAE)}
    folder = write_sae_lens(tmp_path, config=OLD_CONFIG, tensors=tensors)
    assert_agrees(load(folder), load_oracle(folder))


def test_other_finetuning_factor_is_refused(tmp_path: Path, load: Callable[..., SAE]) -> None:
    tensors = sae_lens_tensors("standard") | {"scaling_factor": torch.full((D_SAE,), 1.1)}
    folder = write_sae_lens(tmp_path, config=OLD_CONFIG, tensors=tensors)
    with pytest.raises(ValueError, match="scaling_factor is not 1 everywhere"):
        load(folder)


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (torch.ones(D_SAE, dtype=torch.bool), r"bool \[40\]"),
        (torch.ones(D_SAE, dtype=torch.int32), r"i32 \[40\]"),
        (torch.ones(D_SAE).to(torch.float8_e4m3fn), r"f8_e4m3 \[40\]"),
        (torch.ones(3), r"float32 \[3\]"),
        (torch.ones(()), r"float32 \[\]"),
    ],
)
def test_finetuning_factor_of_another_dtype_or_shape_is_refused(
    tmp_path: Path, load: Callable[..., SAE], factor: torch.Tensor, said: str
) -> None:
    tensors = sae_lens_tensors("standard") | {"scaling_factor": factor}
    folder = write_sae_lens(tmp_path, config=OLD_CONFIG, tensors=tensors)
    with pytest.raises(ValueError, match=rf"scaling_factor is {said}, expected floats \[40\]"):
        load(folder)


def test_registry_factor_is_folded_as_sae_lens_folds_it(tmp_path: Path) -> None:
    config = sae_lens_config("standard", normalize_activations="expected_average_only_in")
    folder = write_sae_lens(tmp_path, "standard", config=config)
    ref = replace(SAEReference.parse(f"l3={folder}"), norm_scaling_factor=0.37)
    theirs = load_oracle(folder)
    theirs.fold_activation_norm_scaling_factor(0.37)
    assert_agrees(open_sae(ref), theirs)


def test_shared_sae_agrees(load: Callable[..., SAE]) -> None:
    folder = next(
        (
            parent / "shared" / "data" / "smollm2-135m-l14"
            for parent in Path(__file__).resolve().parents
            if (parent / "shared" / "data" / "smollm2-135m-l14").is_dir()
        ),
        None,
    )
    if folder is None:
        pytest.skip("the trained test SAE lies beside the checkout, and is not there")
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "jumprelu"
    mine, theirs = load(folder), load_oracle(folder)
    x = inputs(n=4, d_in=576) * 5
    with torch.no_grad():
        torch.testing.assert_close(mine.encode(x), theirs.encode(x), atol=1e-4, rtol=1e-5)
    mine.scan_nonfinite()
