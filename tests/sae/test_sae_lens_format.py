"""SAELens files, against SAELens' own classes in float32."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.registry import RegistryFacts
from sae.sae import SAE, open_sae
from sae.source import ResolvedSAE
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
        # Its run-time normalization keeps state between encode and decode.
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
        ("blocks.3.ln2.hook_in", "blocks.3.hook_resid_mid"),
        ("blocks.3.ln1_post.hook_out", "blocks.3.hook_attn_out"),
        ("blocks.3.ln2_post.hook_out", "blocks.3.hook_mlp_out"),
        ("blocks.3.hook_resid_post.hook_sae_input", HOOK),
        ("model.layers.3", HOOK),
        ("model.language_model.layers.3", HOOK),
        ("language_model.model.layers.3", HOOK),
        ("backbone.layers.3", HOOK),
        ("transformer.h.3", HOOK),
        ("gpt_neox.layers.3", HOOK),
        ("model.decoder.layers.3", HOOK),
        ("model.layers.3.output", HOOK),
        ("model.layers.3.input", "blocks.3.hook_resid_pre"),
        ("model.layers.3.mlp", "blocks.3.mlp.hook_out"),
        ("model.layers.3.self_attn", "blocks.3.attn.hook_out"),
        ("transformer.h.3.attn", "blocks.3.attn.hook_out"),
        ("model.layers.3.post_feedforward_layernorm", "blocks.3.hook_mlp_out"),
    ],
)
def test_every_vocabulary_names_the_same_places(
    tmp_path: Path, load: Callable[..., SAE], name: str, hook: str
) -> None:
    config = sae_lens_config(metadata={"sae_lens_version": "6.54.0", "hook_name": name})
    assert load(write_sae_lens(tmp_path, config=config)).card.hook == hook


def test_sae_of_the_copy_that_the_mlp_is_given_asks_whether_the_stream_will_do(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    metadata = {"sae_lens_version": "6.54.0", "hook_name": "blocks.3.hook_mlp_in"}
    folder = write_sae_lens(tmp_path, config=sae_lens_config(metadata=metadata))
    with pytest.raises(ValueError, match=r"if that will do, .*,hook=blocks\.3\.hook_resid_mid$"):
        load(folder)
    stated = load(folder, hook="blocks.3.hook_resid_mid")
    assert stated.card.hook == "blocks.3.hook_resid_mid"


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
    ref = ResolvedSAE("l3", str(folder), str(folder), facts=RegistryFacts(norm_scaling_factor=0.37))
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


# Hook names


@pytest.mark.parametrize("name", ["model.vision.layers.3", "model.layers.-1", "somewhere"])
def test_hook_decides_over_a_name_that_is_not_understood(
    tmp_path: Path, load: Callable[..., SAE], name: str
) -> None:
    config = sae_lens_config(metadata={"hook_name": name, "hook_layer": -1})
    folder = write_sae_lens(tmp_path, config=config)
    with pytest.raises(ValueError, match=r"cfg\.json: unknown hook point .* state it as .*,hook="):
        load(folder)
    assert load(folder, hook="model.layers.7").card.hook == "blocks.7.hook_resid_post"


@pytest.mark.parametrize("name", ["model.layers.3", HOOK])
def test_hook_agrees_with_a_name_in_any_spelling(
    tmp_path: Path, load: Callable[..., SAE], name: str
) -> None:
    folder = write_sae_lens(tmp_path, config=sae_lens_config(metadata={"hook_name": name}))
    for hook in (HOOK, "transformer.h.3", "blocks.3.hook_out"):
        assert load(folder, hook=hook).card.hook == HOOK
    with pytest.raises(ValueError, match=rf"contradicts the configuration's {name}"):
        load(folder, hook="model.layers.4")


def test_place_at_which_nothing_is_served_is_not_overridden(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    config = sae_lens_config(metadata={"hook_name": "blocks.3.attn.hook_q"})
    folder = write_sae_lens(tmp_path, config=config)
    for stated in ({}, {"hook": HOOK}):
        with pytest.raises(ValueError, match=r"cfg\.json: attention's queries"):
            load(folder, **stated)


@pytest.mark.parametrize("layer", [4, "4"])
@pytest.mark.parametrize("inside", ["top", "metadata"])
def test_layer_beside_a_module_s_name_must_be_its_own(
    tmp_path: Path, load: Callable[..., SAE], layer: object, inside: str
) -> None:
    config = sae_lens_config(metadata={"hook_name": "model.layers.3"})
    (config if inside == "top" else config["metadata"])["hook_layer"] = layer
    with pytest.raises(ValueError, match=f"hook_layer is {layer!r}, the hook is {HOOK}"):
        load(write_sae_lens(tmp_path, config=config))


# Activation functions


def test_activation_function_may_repeat_the_architecture(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    for name in ("jumprelu", "JumpReLU", "relu"):
        config = OLD_CONFIG | {"architecture": "jumprelu", "activation_fn": name}
        folder = write_sae_lens(tmp_path / name, config=config)
        assert load(folder).card.architecture == "jumprelu"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {}}, "k of its top k is stated"),
        ({"activation_fn": "topk"}, "k of its top k is stated nowhere"),
        ({"activation_fn": "TopK", "activation_fn_kwargs": None}, "k of its top k is stated"),
        ({"architecture": "topk"}, "k of its top k is stated nowhere"),
        ({"activation_fn": "tanh-relu"}, "unknown activation_fn 'tanh-relu'"),
        ({"activation_fn": "jumprelu"}, "unknown activation_fn 'jumprelu' beside .*'standard'"),
        ({"architecture": "abstopk", "k": 4, "activation_fn": "topk"}, "unknown activation_fn"),
    ],
)
def test_activation_function_that_is_not_known_whole_is_refused(
    tmp_path: Path, load: Callable[..., SAE], changes: dict[str, Any], said: str
) -> None:
    folder = write_sae_lens(tmp_path, "standard", config=OLD_CONFIG | changes)
    with pytest.raises(ValueError, match=rf"cfg\.json: .*{said}"):
        load(folder)


# Checkpoints of a training run


def checkpoint(folder: Path, scaler: object, **changes: Any) -> Path:
    config = sae_lens_config(
        "jumprelu", **{"normalize_activations": "expected_average_only_in", **changes}
    )
    write_sae_lens(folder, "jumprelu", config=config)
    (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    return folder


def test_factor_of_a_checkpoint_is_folded_as_sae_lens_folds_it(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    folder = checkpoint(tmp_path, {"scaling_factor": 0.37, "has_whitening": False})
    theirs = load_oracle(folder)
    theirs.fold_activation_norm_scaling_factor(0.37)
    assert_agrees(load(folder), theirs)
    assert load(folder).remarks == ()


def test_finished_checkpoint_has_nothing_to_fold(tmp_path: Path, load: Callable[..., SAE]) -> None:
    scaler = {"scaling_factor": None, "has_whitening": False}
    folder = checkpoint(tmp_path, scaler, normalize_activations="none")
    assert_agrees(load(folder), load_oracle(folder))


@pytest.mark.parametrize(
    ("scaler", "changes", "said"),
    [
        ({"scaling_factor": None, "has_whitening": True}, {}, "whitened activations"),
        ({"scaling_factor": 0.4}, {"normalize_activations": "none"}, "whether the factor is fold"),
        ({"scaling_factor": 0}, {}, "scaling_factor must be from"),
        ({"scaling_factor": "0.4"}, {}, "scaling_factor must be a finite number"),
        ([0.4], {}, "expected a JSON object"),
    ],
)
def test_checkpoint_whose_scaling_is_not_plain_is_refused(
    tmp_path: Path, load: Callable[..., SAE], scaler: object, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=rf"activation_scaler\.json: .*{said}"):
        load(checkpoint(tmp_path, scaler, **changes))


@pytest.mark.parametrize("stated", ["expected_average_only_in", "covariance_whitening"])
def test_scaling_that_nothing_tells_of_is_remarked_upon(
    tmp_path: Path, load: Callable[..., SAE], stated: str
) -> None:
    config = sae_lens_config("standard", normalize_activations=stated)
    (remark,) = load(write_sae_lens(tmp_path, "standard", config=config)).remarks
    assert f"trained with normalize_activations {stated}, and nothing says whether" in remark
    assert str(tmp_path / "cfg.json") in remark


# Streams without their mean


def centered_oracle(folder: Path) -> tuple[Any, Any]:
    """SAELens' SAE on x less its mean, which stays in what it is put back into."""
    theirs = load_oracle(folder)

    def decode(f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        return theirs.decode(theirs.encode(x - mean) * 0 + f) + mean  # type: ignore[no-any-return]

    return (lambda x: theirs.encode(x - x.mean(dim=-1, keepdim=True))), decode


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("inside", ["top", "metadata"])
def test_sae_of_centered_weights_reads_the_stream_without_its_mean(
    tmp_path: Path, load: Callable[..., SAE], architecture: str, normalize: str, inside: str
) -> None:
    config = sae_lens_config(architecture, normalize_activations=normalize)
    config["metadata"]["model_name"] = "gpt2-small"
    stated = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    (config if inside == "top" else config["metadata"]).update(stated)
    folder = write_sae_lens(tmp_path, architecture, config=config)
    mine = load(folder)
    with torch.no_grad():
        assert_same_sae(mine, *centered_oracle(folder))
    # The rows that a kernel multiplies with the whole stream.
    if normalize == "none":
        rows = mine.rows([1, 5]).W_enc
        torch.testing.assert_close(rows.mean(dim=1), torch.zeros(2), atol=1e-6, rtol=0)
    mine.scan_nonfinite()


@pytest.mark.parametrize("kwargs", [{}, {"center_writing_weights": False}, {"fold_ln": True}])
def test_weights_that_are_not_centered_are_read_as_they_are(
    tmp_path: Path, load: Callable[..., SAE], kwargs: dict[str, bool]
) -> None:
    config = sae_lens_config(model_from_pretrained_kwargs=kwargs)
    folder = write_sae_lens(tmp_path, config=config)
    assert_agrees(load(folder), load_oracle(folder))


@pytest.mark.parametrize("model", ["gemma-2b", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B"])
def test_model_without_layer_norm_is_never_centered(
    tmp_path: Path, load: Callable[..., SAE], model: str
) -> None:
    config = sae_lens_config(model_from_pretrained_kwargs={"center_writing_weights": True})
    config["metadata"]["model_name"] = model
    folder = write_sae_lens(tmp_path, config=config)
    assert_agrees(load(folder), load_oracle(folder))


def test_centered_stream_that_is_rescaled_by_its_norm_is_refused(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    config = sae_lens_config(
        normalize_activations="constant_norm_rescale",
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )
    with pytest.raises(ValueError, match=r"center_writing_weights with .* is not supported"):
        load(write_sae_lens(tmp_path, config=config))


# What the registry may know of files that do not say it


def test_old_configuration_like_one_that_the_registry_corrects_is_remarked_upon(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    oracle("sae_lens", "sae-lens")
    config = OLD_CONFIG | {"hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8}
    (remark,) = load(write_sae_lens(tmp_path / "a", "standard", config=config)).remarks
    assert "name it as sae_lens://gpt2-small-res-jb/blocks.8.hook_resid_pre" in remark
    # Of another model or place, or with a configuration that says itself what there is to say.
    other = config | {"model_name": "gpt2-medium"}
    assert load(write_sae_lens(tmp_path / "b", "standard", config=other)).remarks == ()
    assert load(write_sae_lens(tmp_path / "c", "standard", config=OLD_CONFIG)).remarks == ()
    metadata = {"sae_lens_version": "6.5.0", "model_name": "gpt2-small"}
    said = sae_lens_config("standard", metadata=metadata | {"hook_name": "blocks.8.hook_resid_pre"})
    assert load(write_sae_lens(tmp_path / "d", "standard", config=said)).remarks == ()


def test_copy_that_the_folders_tell_is_read_as_the_registry_says(
    tmp_path: Path, load: Callable[..., SAE]
) -> None:
    oracle("sae_lens", "sae-lens")
    folder = tmp_path / "GPT2-Small-SAEs-Reformatted" / "blocks.8.hook_resid_pre"
    config = OLD_CONFIG | {"hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8}
    mine = load(write_sae_lens(folder, "standard", config=config))
    with torch.no_grad():
        assert_same_sae(mine, *centered_oracle(folder))
    assert mine.remarks == ()
