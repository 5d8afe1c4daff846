"""Llama Scope and llamascopium: SAEs and transcoders, and what becomes of their scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.errors import SAEError
from sae.sae import SAE
from tests.sae.formulas import assert_formula
from tests.sae.oracles import oracle
from tests.sae.other_suites import (
    write_llama_scope_r1,
    write_llama_scope_transcoder,
    write_llamascopium,
)
from tests.sae.suites import D_IN, D_SAE, HOOK, inputs, weights, write_llama_scope

Load = Callable[..., SAE]


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
                "hook_point_in": "blocks.3.hook_resid_mid",
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


def test_llama_scope_transcoder_has_a_scale_on_each_side(tmp_path: Path, load: Load) -> None:
    sae = load(write_llama_scope_transcoder(tmp_path))
    w, x = weights(), inputs()
    s_in, s_out = D_IN**0.5 / 3.5, D_IN**0.5 / 0.6
    h = s_in * x @ w["W_enc"].T + w["b_enc"]
    f = torch.where(h * w["W_dec"].norm(dim=1) > 0.9 * s_in, h.relu(), 0)
    card = sae.card
    assert (card.kind, card.reads) == ("transcoder", "blocks.3.ln2.hook_normalized")
    torch.testing.assert_close(sae.encode(x), f, atol=1e-4, rtol=1e-4)
    y = (f @ w["W_dec"] + w["b_dec"]) / s_out
    torch.testing.assert_close(sae.decode(f, x), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by_norm", [True, False])
def test_llama_scope_r1_has_its_threshold_in_training_s_units(
    tmp_path: Path, load: Load, by_norm: bool
) -> None:
    folder = write_llama_scope_r1(
        tmp_path,
        sparsity_include_decoder_norm=by_norm,
        dataset_average_activation_norm={"in": 8.5},
    )
    sae = load(folder)
    assert (sae.card.format, sae.card.hook) == ("llamascopium", "blocks.3.hook_resid_post")
    w, x, s = weights(), inputs(), D_IN**0.5 / 8.5
    h = s * x @ w["W_enc"].T + w["b_enc"]
    norm = w["W_dec"].norm(dim=1) if by_norm else 1
    f = torch.where(h * norm > w["threshold"] + 0.1, h.relu(), 0)
    torch.testing.assert_close(sae.encode(x), f, atol=1e-4, rtol=1e-4)
    x_hat = (f @ w["W_dec"] + w["b_dec"]) / s
    torch.testing.assert_close(sae.decode(f, x), x_hat, atol=1e-3, rtol=1e-4)


def test_norm_of_a_dataset_that_is_stated_nowhere_is_refused(tmp_path: Path, load: Load) -> None:
    with pytest.raises(SAEError, match=r"average norm at blocks\.3\.hook_resid_post is"):
        load(write_llama_scope_r1(tmp_path))


@pytest.mark.usefixtures("quiet")
def test_norm_of_a_copy_of_llama_scope_r1_is_the_registry_s(tmp_path: Path, load: Load) -> None:
    oracle("sae_lens", "sae-lens")
    folder = write_llama_scope_r1(tmp_path, repository="Llama-Scope-R1-Distill")
    s = 20.258785842
    torch.testing.assert_close(load(folder).rows([3]).W_enc[0], weights()["W_enc"][3] * s)


@pytest.mark.parametrize(("mode", "scaled"), [("dataset-wise", True), ("inference", False)])
def test_llamascopium_s_top_k_ranks_by_what_is_written(
    tmp_path: Path, load: Load, mode: str, scaled: bool
) -> None:
    sae = load(write_llamascopium(tmp_path / "t", norms=(3.5, 0.6), norm_activation=mode))
    card = sae.card
    assert (card.kind, card.architecture, card.k) == ("transcoder", "topk", 5)
    w, x = weights(), inputs()
    s_in, s_out = (D_IN**0.5 / 3.5, D_IN**0.5 / 0.6) if scaled else (1.0, 1.0)
    h = s_in * x @ w["W_enc"].T + w["b_enc"]
    ranked = h * w["W_dec"].norm(dim=1)
    kept = torch.zeros_like(h, dtype=torch.bool).scatter_(1, ranked.topk(5).indices, True)
    y = (torch.where(kept, h.relu(), 0) @ w["W_dec"] + w["b_dec"]) / s_out
    f = sae.encode(x)
    assert ((f > 0) == (kept & (h > 0))).all()
    torch.testing.assert_close(sae.decode(f, x), y, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sae_type": "lorsa"}, "unknown sae_type 'lorsa'"),
        ({"sae_type": "clt"}, "unknown sae_type 'clt'"),
        ({"act_fn": "gelu"}, "unknown act_fn 'gelu'"),
        ({"norm_activation": "token-wise"}, "unknown norm_activation"),
        ({"use_glu_encoder": True}, "use_glu_encoder is true"),
        ({"top_k": None}, "top_k must be a positive integer"),
    ],
)
def test_llamascopium_that_is_not_understood_is_refused(
    tmp_path: Path, load: Load, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(SAEError, match=what):
        load(write_llamascopium(tmp_path / "t", norms=(3.5, 0.6), **changes))
