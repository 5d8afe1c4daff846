"""Every suite's layout: against the formulas of its architecture, and what it cannot do refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.errors import SAEError
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from tests.sae.oracles import assert_same_sae
from tests.sae.suites import (
    D_IN,
    D_SAE,
    DICTIONARY_CLASSES,
    HOOK,
    dictionary_tensors,
    gemma_scope_2_config,
    sae_lens_config,
    weights,
    write_dictionary_learning,
    write_gemma_scope,
    write_gemma_scope_2,
    write_goodfire,
    write_llama_scope,
    write_qwen_scope,
    write_sae_lens,
    write_sparsify,
)

Load = Callable[..., SAE]
SAVEZ: Any = np.savez  # untyped in NumPy


def topk(h: Tensor, k: int) -> Tensor:
    kept = h >= h.topk(k, dim=-1).values[:, -1:]
    return h.relu() * kept


def assert_formula(
    sae: SAE,
    f_of: Callable[[Tensor, dict[str, Tensor]], Tensor],
    scale: float = 1.0,
) -> None:
    """f_of(x, canonical weights) and f @ W_dec/s + b_dec/s, both in float64."""
    w = {name: tensor.double() for name, tensor in weights().items()}
    assert_same_sae(
        sae,
        lambda x: f_of(x.double(), w).float(),
        lambda f, _: ((f.double() @ w["W_dec"] + w["b_dec"]) / scale).float(),
    )


def jumprelu(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    h = x @ w["W_enc"].T + w["b_enc"]
    return h * (h > w["threshold"])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("upper", [False, True])
def test_gemma_scope(tmp_path: Path, load: Load, upper: bool, compressed: bool) -> None:
    sae = load(write_gemma_scope(tmp_path, upper=upper, compressed=compressed))
    assert (sae.card.format, sae.card.architecture) == ("gemma_scope", "jumprelu")
    assert (sae.card.hook, sae.card.apply_b_dec_to_input) == (HOOK, False)
    assert_formula(sae, jumprelu)


def test_gemma_scope_site_is_the_repository_s(tmp_path: Path, load: Load) -> None:
    assert load(write_gemma_scope(tmp_path, site="mlp")).card.hook == "blocks.3.hook_mlp_out"
    assert load(write_gemma_scope(tmp_path, site="att")).card.hook == "blocks.3.attn.hook_z"
    card = load(write_gemma_scope(tmp_path, site="transcoders")).card
    assert (card.kind, card.reads) == ("transcoder", "blocks.3.ln2.hook_normalized")
    assert card.writes == ("blocks.3.hook_mlp_out",)


def test_gemma_scope_file_alone_needs_its_hook_stated(tmp_path: Path, load: Load) -> None:
    lone = (write_gemma_scope(tmp_path) / "params.npz").rename(tmp_path / "params.npz")
    with pytest.raises(SAEError, match=r"stated nowhere; state it as .*,hook=blocks.LAYER"):
        load(lone)
    assert load(lone, hook="blocks.9.hook_resid_post").card.layer == 9


@pytest.mark.parametrize("key", ["scaling_factor", "Scaling_Factor"])
def test_gemma_scope_factor_is_taken_where_it_is_1_everywhere(
    tmp_path: Path, load: Load, key: str
) -> None:
    path = write_gemma_scope(tmp_path) / "params.npz"
    arrays = dict(np.load(path))
    SAVEZ(path, **arrays, **{key: np.ones(D_SAE, dtype=np.float32)})
    assert_formula(load(path), jumprelu)
    SAVEZ(path, **arrays, **{key: np.full(D_SAE, 1.1, dtype=np.float32)})
    with pytest.raises(SAEError, match=f"{key} is not 1 everywhere"):
        load(path)
    SAVEZ(path, **arrays, **{key: np.ones(D_SAE, dtype=np.int32)})
    with pytest.raises(SAEError, match=rf"{key} is int32 \[40\], expected floats \[40\]"):
        load(path)


@pytest.mark.parametrize("config", [None, gemma_scope_2_config()])
@pytest.mark.parametrize("spell", [str.upper, str.title, lambda name: name.replace("w_", "W_")])
def test_gemma_scope_2_keys_may_have_any_case(
    tmp_path: Path, load: Load, spell: Callable[[str], str], config: dict[str, Any] | None
) -> None:
    folder = write_gemma_scope_2(tmp_path, config=config)
    stored = load_file(folder / "params.safetensors")
    save_file({spell(name): stored[name] for name in stored}, folder / "params.safetensors")
    sae = load(folder)
    assert (sae.card.format, sae.card.hook) == ("gemma_scope_2", HOOK)
    assert_formula(sae, jumprelu)
    skip = {spell("affine_skip_connection"): torch.zeros(D_IN, D_IN)}
    save_file({spell(name): stored[name] for name in stored} | skip, folder / "params.safetensors")
    with pytest.raises(SAEError, match="where this transcoder reads and writes is stated nowhere"):
        load(folder)


@pytest.mark.parametrize("config", [None, gemma_scope_2_config()])
def test_gemma_scope_2_with_and_without_configuration(
    tmp_path: Path, load: Load, config: dict[str, Any] | None
) -> None:
    sae = load(write_gemma_scope_2(tmp_path, config=config))
    assert (sae.card.format, sae.card.hook) == ("gemma_scope_2", HOOK)
    assert_formula(sae, jumprelu)


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        ("model.layers.7.output", "blocks.7.hook_resid_post"),
        ("model.language_model.layers.7.output", "blocks.7.hook_resid_post"),
        ("model.layers.7.post_feedforward_layernorm.output", "blocks.7.hook_mlp_out"),
    ],
)
def test_gemma_scope_2_configuration_names_the_module(
    tmp_path: Path, load: Load, module: str, hook: str
) -> None:
    config = gemma_scope_2_config(hf_hook_point_in=module)
    assert load(write_gemma_scope_2(tmp_path, config=config)).card.hook == hook


@pytest.mark.parametrize(
    ("config", "site", "message"),
    [
        (gemma_scope_2_config(hf_hook_point_in="model.layers.3.norm"), "x", "unknown hook point"),
        (gemma_scope_2_config(hf_hook_point_out="model.layers.2.mlp"), "x", "an earlier layer"),
        (gemma_scope_2_config(type="clt"), "x", "says its layer, as params_layer_3"),
        (gemma_scope_2_config(architecture="relu"), "x", "unknown architecture 'relu'"),
        (None, "somewhere", "stated nowhere"),
    ],
)  # fmt: skip
def test_gemma_scope_2_that_cannot_be_served_is_refused(
    tmp_path: Path, load: Load, config: dict[str, Any] | None, site: str, message: str
) -> None:
    with pytest.raises(SAEError, match=message):
        load(write_gemma_scope_2(tmp_path, config=config, site=site))


def test_llama_scope_folds_its_scale_into_weights_and_threshold(tmp_path: Path, load: Load) -> None:
    sae = load(write_llama_scope(tmp_path))
    assert (sae.card.format, sae.card.architecture) == ("llama_scope", "jumprelu")
    assert (sae.card.hook, sae.card.apply_b_dec_to_input) == (HOOK, False)
    s = D_IN**0.5 / 8.5

    def f_of(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        h = s * x @ w["W_enc"].T + w["b_enc"]
        return torch.where(h > 0.9 * s, h, 0)

    assert_formula(sae, f_of, scale=s)
    rows = sae.rows([4])
    torch.testing.assert_close(rows.W_enc[0], weights()["W_enc"][4] * s)
    torch.testing.assert_close(rows.W_dec[0], weights()["W_dec"][4] / s)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "hook_point_out": "blocks.3.hook_mlp_out",
                "dataset_average_activation_norm": {"in": 1.0},
            },
            "out must be a finite number, got None",
        ),
        ({"act_fn": "relu"}, "unknown act_fn 'relu', expected jumprelu"),
        ({"norm_activation": "token-wise"}, "unknown norm_activation 'token-wise'"),
        ({"dataset_average_activation_norm": {"in": 0}}, r"average norm must be from .*, got 0"),
        ({"dataset_average_activation_norm": {"in": 1e-320}}, "average norm must be from"),
        ({"dataset_average_activation_norm": None}, "in must be a finite number, got None"),
        ({"jump_relu_threshold": "0.9"}, "jump_relu_threshold must be a finite number"),
        ({"d_sae": 41}, "expected \\[41, 12\\]"),
    ],
)
def test_llama_scope_that_does_not_fit_is_refused(
    tmp_path: Path, load: Load, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SAEError, match=message):
        load(write_llama_scope(tmp_path, **changes))


def test_llama_scope_without_configuration_is_refused(tmp_path: Path, load: Load) -> None:
    folder = write_llama_scope(tmp_path)
    (folder / "hyperparams.json").unlink()
    with pytest.raises(SAEError, match=r"missing configuration: no hyperparams\.json"):
        load(folder)


def test_qwen_scope_takes_layer_and_k_from_the_names(tmp_path: Path, load: Load) -> None:
    sae = load(write_qwen_scope(tmp_path))
    assert (sae.card.format, sae.card.architecture, sae.card.k) == ("qwen_scope", "topk", 5)
    assert (sae.card.hook, sae.card.apply_b_dec_to_input) == (HOOK, False)
    assert_formula(sae, lambda x, w: topk(x @ w["W_enc"].T + w["b_enc"], 5))


def test_qwen_scope_without_k_says_how_to_state_it(tmp_path: Path, load: Load) -> None:
    path = write_qwen_scope(tmp_path, repository="copied")
    with pytest.raises(SAEError, match="k is stated nowhere") as caught:
        load(path)
    assert 'put {"k": 50} into a config.json' in str(caught.value)
    (path.parent / "config.json").write_text('{"k": 7}')
    assert load(path).card.k == 7


def test_goodfire_takes_its_layer_from_the_name_or_the_flag(tmp_path: Path, load: Load) -> None:
    sae = load(write_goodfire(tmp_path))
    assert (sae.card.format, sae.card.architecture) == ("goodfire", "standard")
    assert (sae.card.hook, sae.card.apply_b_dec_to_input) == (HOOK, False)
    assert_formula(sae, lambda x, w: (x @ w["W_enc"].T + w["b_enc"]).relu())
    renamed = write_goodfire(tmp_path, name="sae.pt")
    with pytest.raises(SAEError, match="hook point is stated nowhere"):
        load(renamed)
    assert load(renamed, hook="blocks.19.hook_resid_post").card.layer == 19


def test_sparsify_is_the_top_k_of_relu_with_b_dec_subtracted(tmp_path: Path, load: Load) -> None:
    sae = load(write_sparsify(tmp_path))
    assert (sae.card.format, sae.card.architecture, sae.card.k) == ("sparsify", "topk", 5)
    assert sae.card.apply_b_dec_to_input
    assert_formula(sae, lambda x, w: topk((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"], 5))


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        ("layers.23.mlp", "blocks.23.mlp.hook_out"),
        ("layers.23.self_attn", "blocks.23.attn.hook_out"),
        ("model.layers.4", "blocks.4.hook_resid_post"),
        ("model.language_model.layers.4.mlp", "blocks.4.mlp.hook_out"),
        ("layer_18", "blocks.18.hook_resid_post"),
        ("layers_7", "blocks.7.hook_resid_post"),
        ("gpt_neox.layers.2.attention", "blocks.2.attn.hook_out"),
        ("transformer.h.5", "blocks.5.hook_resid_post"),
    ],
)
def test_sparsify_folder_is_the_module(tmp_path: Path, load: Load, module: str, hook: str) -> None:
    assert load(write_sparsify(tmp_path, module=module)).card.hook == hook


@pytest.mark.parametrize("module", ["embed_tokens", "layers.3.mlp.down_proj", "final"])
def test_sparsify_module_that_is_no_hook_point_needs_one_stated(
    tmp_path: Path, load: Load, module: str
) -> None:
    folder = write_sparsify(tmp_path, module=module)
    with pytest.raises(SAEError, match="stated nowhere"):
        load(folder)
    assert load(folder, hook=HOOK).card.hook == HOOK


def test_sparsify_width_may_be_an_expansion_factor(tmp_path: Path, load: Load) -> None:
    folder = write_sparsify(tmp_path, num_latents=0, expansion_factor=32)
    with pytest.raises(SAEError, match=rf"expected \[{32 * D_IN}, {D_IN}\]"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "unknown architecture, expected the top-k of relu"),
        ({"signed": True}, "unknown architecture, expected the top-k of relu"),
        ({"k": D_SAE + 1}, "k is 41, more than d_sae 40"),
    ],
)
def test_sparsify_that_cannot_be_served_is_refused(
    tmp_path: Path, load: Load, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SAEError, match=message):
        load(write_sparsify(tmp_path, **changes))


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
        ({"submodule_name": "mlp"}, {"io": "in"}, r"mlp\.hook_in can be read at and not edi"),
        ({"submodule_name": "blocks.3.attn.hook_q"}, {}, r"json: attention's .* not supported"),
        ({"submodule_name": "resid_post_layer_4"}, {}, "of which the name says layer 4"),
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


# Telling formats apart

WRITERS: dict[str, Callable[[Path], Path]] = {
    "sae_lens": lambda root: write_sae_lens(root / "x") / "sae_weights.safetensors",
    "gemma_scope": lambda root: write_gemma_scope(root) / "params.npz",
    "gemma_scope_2": lambda root: write_gemma_scope_2(root) / "params.safetensors",
    "llama_scope": lambda root: write_llama_scope(root) / "checkpoints" / "final.safetensors",
    "qwen_scope": write_qwen_scope,
    "goodfire": write_goodfire,
    "sparsify": lambda root: write_sparsify(root) / "sae.safetensors",
    "dictionary_learning": lambda root: write_dictionary_learning(root) / "ae.pt",
}


@pytest.mark.parametrize("name", WRITERS)
def test_format_is_told_by_content_under_any_file_name(
    tmp_path: Path, load: Load, name: str
) -> None:
    path = WRITERS[name](tmp_path)
    renamed = path.rename(path.with_name("weights.bin"))
    stated = {"hook": HOOK} if name in ("qwen_scope", "goodfire") else {}
    card = load(renamed, **stated).card
    assert (card.format, card.hook, card.d_in, card.d_sae) == (name, HOOK, D_IN, D_SAE)


@pytest.mark.parametrize("name", WRITERS)
def test_stated_format_is_obeyed_and_still_checked(tmp_path: Path, load: Load, name: str) -> None:
    path = WRITERS[name](tmp_path)
    assert load(path, format=name).card.format == name
    other = "goodfire" if name != "goodfire" else "sae_lens"
    with pytest.raises(SAEError, match="missing"):
        load(path, format=other)


@pytest.mark.parametrize("name", WRITERS)
def test_rows_and_whole_passes_agree_in_every_layout(tmp_path: Path, load: Load, name: str) -> None:
    sae = load(WRITERS[name](tmp_path))
    sae.scan_nonfinite()
    assert sae.nonfinite_latents(range(D_SAE)) == []
    rows = sae.rows(range(D_SAE))
    x = torch.ones(1, D_IN)
    f = torch.randn(1, D_SAE, generator=torch.Generator().manual_seed(0))
    x_hat = (f * rows.decoder_scale) @ rows.W_dec + sae.b_dec
    torch.testing.assert_close(sae.decode(f, x), x_hat, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sae.decoder_row_norms(), rows.W_dec.norm(dim=1))


def test_configuration_survives_its_suite_s_other_keys(tmp_path: Path, load: Load) -> None:
    folder = write_llama_scope(tmp_path)
    config = json.loads((folder / "hyperparams.json").read_text())
    (folder / "hyperparams.json").write_text(json.dumps(config | {"new": [1, {"a": None}]}))
    assert load(folder).card.d_sae == D_SAE


@pytest.mark.parametrize("stated", [{"expansion_factor": 4}, {"num_latents": D_SAE}])
def test_sae_lens_configuration_may_state_what_sparsify_does(
    tmp_path: Path, load: Load, stated: dict[str, int]
) -> None:
    folder = write_sae_lens(tmp_path, "topk", config=sae_lens_config("topk", **stated))
    assert (load(folder).card.format, load(folder).card.k) == ("sae_lens", 5)


def test_sparsify_that_misses_a_tensor_is_still_sparsify(tmp_path: Path, load: Load) -> None:
    path = write_sparsify(tmp_path) / "sae.safetensors"
    stored = load_file(path)
    save_file({name: stored[name] for name in stored if name != "W_dec"}, path)
    with pytest.raises(SAEError, match="missing tensor W_dec"):
        load(path)


@pytest.mark.parametrize(("d_sae", "d_in"), [(0, 12), (5, 0)])
def test_sae_without_latents_or_without_width_is_refused(
    tmp_path: Path, load: Load, d_sae: int, d_in: int
) -> None:
    path = write_goodfire(tmp_path)
    tensors = {
        "encoder_linear.weight": torch.zeros(d_sae, d_in),
        "encoder_linear.bias": torch.zeros(d_sae),
        "decoder_linear.weight": torch.zeros(d_in, d_sae),
        "decoder_linear.bias": torch.zeros(d_in),
    }
    torch.save(tensors, path)
    with pytest.raises(SAEError, match=f"d_in is {d_in} and d_sae {d_sae}, both must be at least"):
        load(path)


CONFIGURED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "gemma_scope_2": (
        lambda root: write_gemma_scope_2(root, config=gemma_scope_2_config()),
        "config.json",
    ),
    "llama_scope": (write_llama_scope, "hyperparams.json"),
    "sparsify": (write_sparsify, "cfg.json"),
    "dictionary_learning": (
        lambda root: write_dictionary_learning(root, "AutoEncoderTopK"),
        "config.json",
    ),
}

SINK_NORMS: dict[str, tuple[str, str | None]] = {
    "gemma_scope_2": ("config.json", "metadata"),
    "gemma_scope": ("config.json", None),
    "llama_scope": ("hyperparams.json", None),
    "qwen_scope": ("config.json", "metadata"),
    "goodfire": ("config.json", None),
    "sparsify": ("cfg.json", None),
    "dictionary_learning": ("config.json", "trainer"),
    "sae_lens": ("cfg.json", "metadata"),
}


@pytest.mark.parametrize("name", SINK_NORMS)
def test_sink_norm_is_read_and_checked_in_every_format(
    tmp_path: Path, load: Load, name: str
) -> None:
    path = WRITERS[name](tmp_path)
    file_name, section = SINK_NORMS[name]
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    file = folder / file_name
    config = json.loads(file.read_text()) if file.exists() else {}

    def state(sink_norm: object) -> None:
        inside = config if section is None else config.setdefault(section, {})
        inside["sink_norm"] = sink_norm
        file.write_text(json.dumps(config))

    state(800)
    assert load(path).card.sink_norm == 800.0
    assert load(path, sink_norm="2000").card.sink_norm == 2000.0
    state(None)
    assert load(path).card.sink_norm is None
    for wrong in (0, "800", True, float("inf"), [800]):
        state(wrong)
        with pytest.raises(SAEError, match=f"{file_name}: sink_norm must be a positive finite"):
            load(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(CONFIGURED)), value=JSON)
def test_any_value_in_any_configuration_is_refused_or_understood(
    data: st.DataObject, name: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    writer, file_name = CONFIGURED[name]
    folder = writer(tmp_path_factory.mktemp("suite"))
    config = json.loads((folder / file_name).read_text())
    inside = config["trainer"] if name == "dictionary_learning" else config
    inside[data.draw(st.sampled_from(sorted(inside)), label="key")] = value
    (folder / file_name).write_text(json.dumps(config))
    try:
        sae = open_sae(SAEReference.parse(f"l3={folder}"))
    except SAEError as error:
        assert "\n" not in str(error)
    else:
        assert sae.encode(torch.ones(2, D_IN)).isfinite().all()


# What a suite leaves open, or says in its own way


@pytest.mark.parametrize("stated", [{}, {"hook": "blocks.0.hook_resid_pre"}])
def test_embedding_of_gemma_scope_reads_the_stream_divided_by_root_d(
    tmp_path: Path, load: Load, stated: dict[str, str]
) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    folder.parent.mkdir(parents=True)
    write_gemma_scope(tmp_path / "written").rename(folder)
    sae = load(folder, **stated)
    assert sae.card.hook == "blocks.0.hook_resid_pre"
    root = D_IN**0.5
    assert_formula(sae, lambda x, w: jumprelu(x / root, w), scale=1 / root)
    with pytest.raises(SAEError, match="contradicts"):
        load(folder, hook="blocks.1.hook_resid_pre")


@pytest.mark.parametrize("include", [True, False, None])
def test_llama_scope_threshold_counts_the_decoder_norm_where_it_is_said_to(
    tmp_path: Path, load: Load, include: bool | None
) -> None:
    sae = load(write_llama_scope(tmp_path, sparsity_include_decoder_norm=include))
    s = D_IN**0.5 / 8.5

    def f_of(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        h = s * x @ w["W_enc"].T + w["b_enc"]
        measure = h * w["W_dec"].norm(dim=1) if include else h
        return torch.where((measure > 0.9 * s) & (h > 0), h, 0)

    assert_formula(sae, f_of, scale=s)
    threshold = 0.9 * s / weights()["W_dec"][4].norm() if include else torch.tensor(0.9 * s)
    torch.testing.assert_close(sae.rows([4]).threshold[0], threshold)


def test_llama_scope_without_decoder_bias_has_none(tmp_path: Path, load: Load) -> None:
    folder = write_llama_scope(tmp_path, use_decoder_bias=False)
    path = folder / "checkpoints" / "final.safetensors"
    stored = load_file(path)
    save_file({name: stored[name] for name in stored if name != "decoder.bias"}, path)
    sae = load(folder)
    assert not sae.b_dec.any()
    sae.scan_nonfinite()
    assert sae.encode(torch.ones(2, D_IN)).isfinite().all()
    assert not sae.decode(torch.zeros(2, D_SAE), torch.ones(2, D_IN)).any()


def test_llama_scope_with_another_encoder_is_refused(tmp_path: Path, load: Load) -> None:
    with pytest.raises(SAEError, match="use_glu_encoder is true"):
        load(write_llama_scope(tmp_path, use_glu_encoder=True))


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


HOOK_KEYS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "sae_lens": (lambda root: write_sae_lens(root / "x"), "cfg.json", "hook_name"),
    "gemma_scope_2": (
        lambda root: write_gemma_scope_2(root / "x", config=gemma_scope_2_config()),
        "config.json",
        "hf_hook_point_in",
    ),
    "llama_scope": (write_llama_scope, "hyperparams.json", "hook_point_in"),
    "dictionary_learning": (write_dictionary_learning, "config.json", "submodule_name"),
}


@pytest.mark.parametrize("value", [3, ["blocks.3"], {"a": 1}, True, "", "somewhere", "layer 3"])
@pytest.mark.parametrize("name", HOOK_KEYS)
def test_hook_decides_over_whatever_a_configuration_says_and_nobody_understands(
    tmp_path: Path, load: Load, name: str, value: object
) -> None:
    writer, file_name, key = HOOK_KEYS[name]
    if (name, value) == ("dictionary_learning", ""):
        pytest.skip("the library itself records no name, and means the stream")
    folder = writer(tmp_path)
    config = json.loads((folder / file_name).read_text())
    for inside in (config, config.get("metadata", {}), config.get("trainer", {})):
        if key in inside:
            inside[key] = value
    config.pop("hook_point_out", None)
    (folder / file_name).write_text(json.dumps(config))
    assert load(folder, hook="model.layers.7").card.hook == "blocks.7.hook_resid_post"
    with pytest.raises(SAEError, match=rf"{file_name}: .*,hook=blocks\.LAYER"):
        load(folder)
