"""Suites of one torch file an SAE, whose names say what the file does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sae.errors import SAEError
from sae.sae import SAE, check_fits
from tests.sae.formulas import assert_formula, relu, topk
from tests.sae.oracles import assert_same_sae
from tests.sae.other_suites import write_attention_sae, write_qresearch
from tests.sae.suites import D_IN, HOOK, weights, write_goodfire, write_qwen_scope

Load = Callable[..., SAE]


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


def test_attention_sae_is_read_at_the_heads(tmp_path: Path, load: Load) -> None:
    sae = load(write_attention_sae(tmp_path))
    card = sae.card
    assert (card.format, card.hook, card.d_in) == ("attention_saes", "blocks.3.attn.hook_z", D_IN)
    w = weights()
    assert_same_sae(
        sae,
        lambda x: relu(x - w["b_dec"], w),
        lambda f, _: f @ w["W_dec"] + w["b_dec"],
    )
    check_fits(card, d_model=D_IN + 4, num_layers=4)


def test_qresearch_sae_has_its_layer_in_its_name(tmp_path: Path, load: Load) -> None:
    sae = load(write_qresearch(tmp_path))
    assert (sae.card.format, sae.card.hook) == ("qresearch", "blocks.3.hook_resid_post")
    w = weights()
    assert_same_sae(sae, lambda x: relu(x, w), lambda f, _: f @ w["W_dec"] + w["b_dec"])
