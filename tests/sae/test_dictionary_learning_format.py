"""dictionary_learning: its classes by their formulas, its hook points and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae.errors import SAEError
from sae.sae import SAE
from tests.sae.formulas import assert_formula, topk
from tests.sae.oracles import assert_same_sae
from tests.sae.suites import (
    DICTIONARY_CLASSES,
    HOOK,
    dictionary_tensors,
    weights,
    write_dictionary_learning,
)

Load = Callable[..., SAE]


@pytest.mark.parametrize("dict_class", DICTIONARY_CLASSES)
def test_dictionary_learning_by_its_formulas(tmp_path: Path, load: Load, dict_class: str) -> None:
    sae = load(write_dictionary_learning(tmp_path, dict_class))
    assert (sae.card.format, sae.card.hook) == ("dictionary_learning", HOOK)
    w = {name: tensor.double() for name, tensor in weights().items()}
    norms = w["W_dec"].norm(dim=1)

    def f_of(x: Tensor) -> Tensor:
        x = x.double()
        if dict_class not in ("AutoEncoderNew", "JumpReluAutoEncoder"):
            x = x - w["b_dec"]
        z = x @ w["W_enc"].T
        h = (z + w["b_enc"]).relu()
        f: Tensor = {
            "AutoEncoder": h * norms,
            "AutoEncoderNew": h,
            "GatedAutoEncoder": (z * w["r_mag"].exp() + w["b_mag"]).relu() * (z + w["b_gate"] > 0),
            "AutoEncoderTopK": topk(h, 5),
            "BatchTopKSAE": h * (h > 0.7),
            "MatryoshkaBatchTopKSAE": h * (h > 0.7),
            "JumpReluAutoEncoder": h * (h > w["threshold"]),
        }[dict_class].float()
        return f

    def decode(f: Tensor, _: Tensor) -> Tensor:
        plain = f / norms if dict_class == "AutoEncoder" else f
        return (plain.double() @ w["W_dec"] + w["b_dec"]).float()

    assert_same_sae(sae, f_of, decode)


def test_dictionary_learning_threshold_below_zero_is_relu(tmp_path: Path, load: Load) -> None:
    tensors = dictionary_tensors("BatchTopKSAE") | {"threshold": torch.tensor(-1.0)}
    sae = load(write_dictionary_learning(tmp_path, tensors=tensors))
    assert_formula(sae, lambda x, w: ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu())


@pytest.mark.parametrize(
    ("submodule", "side", "hook"),
    [
        ("resid_post_layer_3", "out", "blocks.3.hook_resid_post"),
        (None, "out", "blocks.3.hook_resid_post"),
        ("resid_post_layer_3", "in", "blocks.3.hook_resid_pre"),
        ("mlp_layer_3", "out", "blocks.3.mlp.hook_out"),
        ("mlp_out_layer_3", "out", "blocks.3.mlp.hook_out"),
        ("attention_layer_3", "out", "blocks.3.attn.hook_out"),
        ("resid_pre_layer_3", "out", "blocks.3.hook_resid_pre"),
        ("resid_mid_layer_3", "out", "blocks.3.hook_resid_mid"),
        ("blocks.3.hook_resid_pre", "out", "blocks.3.hook_resid_pre"),
        ("blocks.3.hook_resid_mid", "out", "blocks.3.hook_resid_mid"),
        ("model.layers.3", "out", "blocks.3.hook_resid_post"),
        ("model.layers.3", "in", "blocks.3.hook_resid_pre"),
        ("gpt_neox.layers.3.mlp", "out", "blocks.3.mlp.hook_out"),
    ],
)
def test_dictionary_learning_hook_is_the_submodule_s_recorded_side(
    tmp_path: Path, load: Load, submodule: str | None, side: str, hook: str
) -> None:
    folder = write_dictionary_learning(
        tmp_path, trainer={"submodule_name": submodule}, buffer={"io": side}
    )
    assert load(folder).card.hook == hook


@pytest.mark.parametrize(
    ("trainer", "buffer", "message"),
    [
        ({"dict_class": "CrossCoder"}, {}, "unknown architecture .dict_class 'CrossCoder'"),
        ({"dict_class": None}, {}, "dict_class must be a string"),
        ({"layer": -1}, {}, r"config\.json: unknown hook point 'resid_post_layer_3 of layer -1"),
        ({"submodule_name": "mlp"}, {"io": "in"}, r"mlp\.hook_in can be read but not edited"),
        ({"submodule_name": "blocks.3.attn.hook_q"}, {}, r"json: attention's .* not supported"),
        ({"submodule_name": "resid_post_layer_4"}, {}, "whose name says layer 4"),
        ({}, {"io": "in_and_out"}, "this is a transcoder"),
        ({"activation_dim": 13}, {}, r"expected \[40, 13\]"),
    ],
)
def test_dictionary_learning_that_cannot_be_served_is_refused(
    tmp_path: Path, load: Load, trainer: dict[str, Any], buffer: dict[str, Any], message: str
) -> None:
    with pytest.raises(SAEError, match=message):
        load(write_dictionary_learning(tmp_path, trainer=trainer, buffer=buffer))


def test_dictionary_learning_k_must_be_the_weights_k(tmp_path: Path, load: Load) -> None:
    with pytest.raises(SAEError, match=r"k is 5, config\.json says 6"):
        load(write_dictionary_learning(tmp_path, "AutoEncoderTopK", trainer={"k": 6}))


def test_dictionary_learning_without_configuration_is_refused(tmp_path: Path, load: Load) -> None:
    folder = write_dictionary_learning(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(SAEError, match=r"missing configuration: no config\.json"):
        load(folder)


@pytest.mark.parametrize("layer", ["", -1, True, 1.5, [3], "last"])
def test_dictionary_learning_layer_that_is_none_leaves_it_to_the_hook(
    tmp_path: Path, load: Load, layer: object
) -> None:
    folder = write_dictionary_learning(tmp_path, trainer={"layer": layer})
    with pytest.raises(SAEError, match=r"config\.json: unknown hook point .*state it as .*,hook="):
        load(folder)
    assert load(folder, hook="model.layers.7").card.hook == "blocks.7.hook_resid_post"


@pytest.mark.parametrize("layer", ["3", "03", 3, None])
def test_dictionary_learning_layer_may_be_written_in_digits(
    tmp_path: Path, load: Load, layer: object
) -> None:
    folder = write_dictionary_learning(tmp_path, trainer={"layer": layer})
    assert load(folder).card.hook == HOOK


@pytest.mark.parametrize(
    ("trainer", "buffer"),
    [
        ({"submodule_name": "my_place"}, {}),
        ({"submodule_name": ["resid"]}, {}),
        ({"submodule_name": "router_layer_3"}, {}),
        ({"submodule_name": "resid_mid_layer_3"}, {"io": "in"}),
        ({}, {"io": "sideways"}),
        ({}, {"io": 3}),
    ],
)
def test_dictionary_learning_place_that_is_not_understood_is_asked_for(
    tmp_path: Path, load: Load, trainer: dict[str, Any], buffer: dict[str, Any]
) -> None:
    folder = write_dictionary_learning(tmp_path, trainer=trainer, buffer=buffer)
    with pytest.raises(SAEError, match=r"config\.json: unknown hook point"):
        load(folder)
    assert load(folder, hook=HOOK).card.hook == HOOK


def test_dictionary_learning_in_safetensors_is_what_it_is(tmp_path: Path, load: Load) -> None:
    folder = write_dictionary_learning(tmp_path)
    (folder / "ae.pt").unlink()
    save_file(dictionary_tensors("BatchTopKSAE"), folder / "ae.safetensors")
    sae = load(folder)
    assert (sae.card.format, sae.card.hook) == ("dictionary_learning", HOOK)
    (folder / "config.json").unlink()
    with pytest.raises(SAEError, match=r"no config\.json, which one of dictionary_learning has"):
        load(folder)
