"""Gemma Scope and Gemma Scope 2: SAEs, transcoders, a CLT's layers and a crosscoder's slots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.errors import SAEError
from sae.sae import SAE
from tests.sae.formulas import assert_formula, assert_transcoder, jumprelu
from tests.sae.other_suites import (
    LAYERS,
    decoders,
    write_crosscoder,
    write_gemma_scope_2_clt,
    write_gemma_scope_2_transcoder,
)
from tests.sae.suites import (
    D_IN,
    D_SAE,
    HOOK,
    gemma_scope_2_config,
    inputs,
    weights,
    write_gemma_scope,
    write_gemma_scope_2,
)

Load = Callable[..., SAE]


SAVEZ: Any = np.savez  # untyped in NumPy


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
        (gemma_scope_2_config(type="clt"), "x", "its layer in its name, as params_layer_3"),
        (gemma_scope_2_config(architecture="relu"), "x", "unknown architecture 'relu'"),
        (None, "somewhere", "stated nowhere"),
    ],
)  # fmt: skip
def test_gemma_scope_2_that_cannot_be_served_is_refused(
    tmp_path: Path, load: Load, config: dict[str, Any] | None, site: str, message: str
) -> None:
    with pytest.raises(SAEError, match=message):
        load(write_gemma_scope_2(tmp_path, config=config, site=site))


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


def test_gemma_scope_transcoder_reads_before_the_gain(tmp_path: Path, load: Load) -> None:
    sae = load(write_gemma_scope(tmp_path, site="transcoders"))
    assert_transcoder(sae, jumprelu, reads="blocks.3.ln2.hook_normalized")


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("config", [False, True])
def test_gemma_scope_2_transcoder_reads_what_the_mlp_is_given(
    tmp_path: Path, load: Load, affine: bool, config: bool
) -> None:
    sae = load(write_gemma_scope_2_transcoder(tmp_path, affine=affine, config=config))
    assert sae.card.format == "gemma_scope_2"
    assert_transcoder(sae, jumprelu, with_skip=affine)


@pytest.mark.parametrize("site", ["attn_out", "attn_out_all"])
def test_gemma_scope_2_attention_is_read_at_the_heads(
    tmp_path: Path, load: Load, site: str
) -> None:
    folder = write_gemma_scope_2_transcoder(tmp_path, affine=False, config=False, site=site)
    card = load(folder).card
    assert (card.kind, card.hook, card.reads) == ("sae", *["blocks.3.attn.hook_z"] * 2)


@pytest.mark.parametrize("config", [False, True])
def test_gemma_scope_2_clt_writes_at_its_own_layer_and_every_later_one(
    tmp_path: Path, load: Load, config: bool
) -> None:
    folder = write_gemma_scope_2_clt(tmp_path, config=config)
    sae = load(folder, layer="4")
    card = sae.card
    assert (card.kind, card.reads, card.layer) == ("clt", "blocks.4.mlp.hook_in", 4)
    assert card.writes == ("blocks.4.hook_mlp_out", "blocks.5.hook_mlp_out")
    assert not card.error_term
    stored = decoders(LAYERS, seed=4)
    for place in (0, 1):
        torch.testing.assert_close(sae.rows([7, 2], place).W_dec, stored[[7, 2], 4 + place])
    torch.testing.assert_close(sae.decoder_rows(1, 3), stored[1:3, 4:].sum(dim=1))
    torch.testing.assert_close(sae.encode(inputs()), jumprelu(inputs(), weights()))


def test_crosscoder_s_slot_is_an_sae_of_its_layer(tmp_path: Path, load: Load) -> None:
    for config in (False, True):
        folder = write_crosscoder(tmp_path / str(config), config=config)
        sae = load(folder, layer="9")
        card = sae.card
        assert (card.kind, card.reads) == ("crosscoder", "blocks.9.hook_resid_post")
        assert card.writes == ("blocks.9.hook_resid_post",)
        assert not card.error_term
        stored = decoders(3, seed=1)
        torch.testing.assert_close(sae.rows([7]).W_dec[0], stored[7, 1])
        torch.testing.assert_close(sae.decoder_rows(0, D_SAE), stored[:, 1])
        with pytest.raises(SAEError, match=r"has no layer 1; it has 5, 9, 12"):
            load(folder, layer="1")


def test_crosscoder_of_unknown_layers_is_refused(tmp_path: Path, load: Load) -> None:
    folder = write_crosscoder(tmp_path, config=False)
    plain = folder.rename(tmp_path / "crosscoder")
    with pytest.raises(SAEError, match="nothing states which layers this crosscoder reads"):
        load(plain, layer="1")
