"""Formats told apart by what the files hold, and what holds of every one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import SAEError
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from tests.sae.any_json import JSON
from tests.sae.suites import (
    D_IN,
    D_SAE,
    HOOK,
    gemma_scope_2_config,
    sae_lens_config,
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
