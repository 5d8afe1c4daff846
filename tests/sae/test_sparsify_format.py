"""sparsify: SAEs and transcoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.errors import SAEError
from sae.sae import SAE
from tests.sae.formulas import READS, assert_formula, topk
from tests.sae.oracles import sparsify_oracle
from tests.sae.other_suites import skip
from tests.sae.suites import D_IN, D_SAE, HOOK, inputs, write_sparsify

Load = Callable[..., SAE]


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
        ({"activation": "groupmax"}, "unknown architecture .activation 'groupmax', signed false"),
        ({"signed": True}, "unknown architecture .activation 'topk', signed true., expected the "),
        ({"k": D_SAE + 1}, "k is 41, more than d_sae 40"),
    ],
)
def test_sparsify_that_cannot_be_served_is_refused(
    tmp_path: Path, load: Load, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SAEError, match=message):
        load(write_sparsify(tmp_path, **changes))


def test_sparsify_that_misses_a_tensor_is_still_sparsify(tmp_path: Path, load: Load) -> None:
    path = write_sparsify(tmp_path) / "sae.safetensors"
    stored = load_file(path)
    save_file({name: stored[name] for name in stored if name != "W_dec"}, path)
    with pytest.raises(SAEError, match="missing tensor W_dec"):
        load(path)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("with_skip", "old"), [(False, False), (True, False), (True, True)])
def test_sparsify_transcoder_agrees_with_its_library(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, with_skip: bool, old: bool
) -> None:
    folder = write_sparsify(
        tmp_path, module="layers.3.mlp", transcode=True, skip_connection=with_skip
    )
    if old:  # of before February 2025, when b_dec was subtracted
        config = json.loads((folder / "cfg.json").read_text())
        del config["transcode"]
        (folder / "cfg.json").write_text(json.dumps(config))
    if with_skip:
        path = folder / "sae.safetensors"
        save_file(load_file(path) | {"W_skip": skip()}, path)
    theirs = sparsify_oracle(folder, monkeypatch)
    mine = load(folder)
    card = mine.card
    assert (card.kind, card.reads, card.writes) == (
        "transcoder", READS, ("blocks.3.mlp.hook_out",),
    )  # fmt: skip
    x = inputs()
    top = theirs.encode(x)
    f = torch.zeros(len(x), D_SAE).scatter_(1, top.top_indices, top.top_acts)
    torch.testing.assert_close(mine.encode(x), f, atol=1e-5, rtol=1e-5)
    y = theirs.decode(top.top_acts, top.top_indices)
    y = y + x @ skip().mT if with_skip else y
    torch.testing.assert_close(mine.decode(f, x), y, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("where", ["top", "sae"])
def test_run_of_sparsify_says_that_its_folders_are_transcoders(
    tmp_path: Path, load: Load, where: str
) -> None:
    folder = write_sparsify(tmp_path, module="layers.3.mlp", transcode=None)
    assert load(folder).card.hook == "blocks.3.mlp.hook_out"
    run = tmp_path / "config.json"
    run.write_text(json.dumps({"transcode": True} if where == "top" else {"sae": {"transcode": 1}}))
    card = load(folder).card
    # Those of that time subtracted b_dec from a transcoder's input as well.
    assert (card.kind, card.reads, card.apply_b_dec_to_input) == ("transcoder", READS, True)
    # Something else's, which says nothing.
    for content in ('{"transcode": false}', '{"model_type": "llama"}', "[1]", "{", '{"sae": 3}'):
        run.write_text(content)
        assert load(folder).card.hook == "blocks.3.mlp.hook_out"
