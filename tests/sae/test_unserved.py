"""What is not served is refused as what it is, by its names before its weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae.errors import SAEError
from sae.sae import SAE
from sae.unserved import refuse_by_name
from tests.sae.suites import (
    D_IN,
    D_SAE,
    HOOK,
    sae_lens_config,
    sae_lens_tensors,
    weights,
    write_gemma_scope,
    write_gemma_scope_2,
    write_goodfire,
    write_sae_lens,
    write_sparsify,
)

Load = Callable[..., SAE]

# Names


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("mwhanna/qwen3-4b-transcoders", "a transcoder"),
        ("google/gemma-scope-2-4b-pt/transcoder_all/layer_0_width_16k_l0_big", "a transcoder"),
        ("EleutherAI/skip-transcoder-Llama-3.2-1B/layers.3.mlp", "a transcoder"),
        ("mntss/clt-gemma-2-2b-2.5M", "a cross-layer transcoder"),
        ("google/gemma-scope-2-1b-it/clt/width_262k_l0_big", "a cross-layer transcoder"),
        ("google/gemma-scope-2-1b-it/crosscoder/layer_7_13_17_22_width_65k", "a crosscoder"),
        ("OpenMOSS/Llama-Scope-2/lorsa/8x/k128", "a Lorsa"),
        ("google/gemma-scope-2b-pt-att/layer_0/width_16k", r"hook_z\) are not supported"),
        ("google/gemma-scope-9b-pt-att", r"hook_z\) are not supported"),
        ("google/gemma-scope-2-4b-pt/attn_out/layer_17_width_16k_l0_big", "hook_z"),
        ("google/gemma-scope-2-4b-pt/attn_out_all/layer_17_width_16k_l0_big", "hook_z"),
        ("someone/saes/blocks.3.attn.hook_z", "hook_z"),
    ],
)
def test_names_rule_a_source_out(path: str, what: str) -> None:
    with pytest.raises(SAEError, match=what) as caught:
        refuse_by_name(f"hf://{path}", path)
    assert str(caught.value).startswith(f"hf://{path}: ")


@pytest.mark.parametrize(
    "path",
    [
        "google/gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_105",
        "google/gemma-scope-2-4b-pt/resid_post/layer_17_width_16k_l0_big",
        "google/gemma-scope-2-4b-pt/mlp_out_all/layer_17_width_16k_l0_big",
        "fnlp/Llama3_1-8B-Base-LXA-8x/Llama3_1-8B-Base-L0A-8x",
        "jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs/v5_32k_layer_0",
        "jbloom/GPT2-Small-OAI-v5-32k-resid-mid-SAEs/v5_32k_layer_0",
        # A folder of SAEs beside one of transcoders, and words that only contain another.
        "someone/saes-and-transcoders/resid/layer_3",
        "someone/transcoders/saes/layer_3",
        "cltech/embeddings/layer_3",
    ],
)
def test_names_of_what_is_served_are_no_obstacle(path: str) -> None:
    refuse_by_name(f"hf://{path}", path)


@pytest.mark.parametrize("parts", [("transcoders", "layer_3"), ("my-transcoder", "a", "b")])
@pytest.mark.parametrize("stated", [{}, {"hook": HOOK}])
def test_folder_s_name_is_not_overridden_by_a_hook(
    tmp_path: Path, load: Load, parts: tuple[str, ...], stated: dict[str, str]
) -> None:
    folder = tmp_path.joinpath("x", *parts)
    shutil.copytree(write_gemma_scope(tmp_path / "written"), folder)
    with pytest.raises(SAEError, match=r"by its name .* this is a transcoder"):
        load(folder, **stated)


@pytest.mark.parametrize("site", ["att", "transcoders"])
def test_repository_of_gemma_scope_is_not_overridden_by_a_hook(
    tmp_path: Path, load: Load, site: str
) -> None:
    with pytest.raises(SAEError, match=r"hook_z\) are not supported|this is a transcoder"):
        load(write_gemma_scope(tmp_path, site=site), hook=HOOK)


def test_configuration_that_is_plain_goes_before_the_folder_s_name(
    tmp_path: Path, load: Load
) -> None:
    assert load(write_sae_lens(tmp_path / "my-transcoders" / "sae")).card.hook == HOOK


# Configurations


@pytest.mark.parametrize(
    "said",
    [
        {"is_transcoder": True},
        {"out_hook_point": "blocks.3.hook_mlp_out"},
        {"hook_name_out": "blocks.3.hook_mlp_out"},
        {"hook_point_out": "blocks.3.hook_mlp_out"},
        {"hf_hook_name_out": "model.layers.3.mlp.output"},
        {"architecture": "skip_transcoder"},
        {"architecture": "jumprelu_transcoder"},
        {"transcode": True},
    ],
)
@pytest.mark.parametrize("inside", ["top", "metadata"])
@pytest.mark.parametrize("stated", [{}, {"hook": HOOK}])
def test_transcoder_of_any_spelling_is_refused_as_one(
    tmp_path: Path, load: Load, said: dict[str, Any], inside: str, stated: dict[str, str]
) -> None:
    config = sae_lens_config()
    (config if inside == "top" else config["metadata"]).update(said)
    with pytest.raises(SAEError, match=r"cfg\.json: this is a transcoder"):
        load(write_sae_lens(tmp_path / "sae", config=config), **stated)


@pytest.mark.parametrize(
    "said",
    [
        {"is_transcoder": False},
        {"hook_name_out": None},
        {"out_hook_point": HOOK, "hook_name": HOOK},
    ],
)
def test_configuration_that_only_has_the_keys_is_of_an_sae(
    tmp_path: Path, load: Load, said: dict[str, Any]
) -> None:
    config = sae_lens_config(**said)
    assert load(write_sae_lens(tmp_path / "sae", config=config)).card.kind == "sae"


@pytest.mark.parametrize(
    ("kind", "what"),
    [("crosscoder", "this is a crosscoder"), ("clt", "this is a cross-layer transcoder")],
)
def test_gemma_scope_2_of_several_layers_is_refused_as_what_it_is(
    tmp_path: Path, load: Load, kind: str, what: str
) -> None:
    folder = write_gemma_scope_2(tmp_path)
    (folder / "config.json").write_text(
        json.dumps({"type": kind, "hf_hook_point_in": "model.layers.{5,9,12,15}.output"})
    )
    with pytest.raises(SAEError, match=what):
        load(folder)


@pytest.mark.parametrize("where", ["top", "sae"])
def test_run_of_sparsify_says_that_its_folders_are_transcoders(
    tmp_path: Path, load: Load, where: str
) -> None:
    folder = write_sparsify(tmp_path, module="layers.3.mlp", transcode=None)
    assert load(folder).card.hook == "blocks.3.mlp.hook_out"
    run = tmp_path / "config.json"
    run.write_text(json.dumps({"transcode": True} if where == "top" else {"sae": {"transcode": 1}}))
    for stated in ({}, {"hook": "blocks.3.hook_mlp_out"}):
        with pytest.raises(SAEError, match=r"config\.json: this is a transcoder .*its run"):
            load(folder, **stated)
    # Something else's, which says nothing.
    for content in ('{"transcode": false}', '{"model_type": "llama"}', "[1]", "{", '{"sae": 3}'):
        run.write_text(content)
        assert load(folder).card.hook == "blocks.3.mlp.hook_out"


# Tensors


def circuit_tracer() -> dict[str, Tensor]:
    w = weights()
    return {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


R1 = {
    "encoder.weight": torch.zeros(D_SAE, D_IN),
    "encoder.bias": torch.zeros(D_SAE),
    "decoder.weight": torch.zeros(D_IN, D_SAE),
    "decoder.bias": torch.zeros(D_IN),
    "log_jumprelu_threshold": torch.zeros(D_SAE),
}


@pytest.mark.parametrize(
    ("name", "tensors", "what"),
    [
        ("layer_3.safetensors", circuit_tracer(), "this is a transcoder of circuit-tracer"),
        ("any.safetensors", circuit_tracer(), "this is a transcoder of circuit-tracer"),
        (
            "layer_3.safetensors",
            circuit_tracer() | {"activation_function.threshold": torch.zeros(D_SAE)},
            "this is a transcoder of circuit-tracer",
        ),
        (
            "layer_3.safetensors",
            circuit_tracer() | {"W_skip": torch.zeros(D_IN, D_IN)},
            "this is a transcoder .tensor W_skip.",
        ),
        ("W_enc_3.safetensors", {"W_enc_3": torch.zeros(3, 4)}, "cross-layer transcoder"),
        ("x.safetensors", {"W_dec_3": torch.zeros(3, 2, 4)}, "this is a cross-layer transcoder"),
        (
            "params_layer_2.safetensors",
            {"w_enc": torch.zeros(4, 3), "w_dec": torch.zeros(3, 2, 4)},
            "a crosscoder",
        ),
        (
            "x.safetensors",
            {"w_enc": torch.zeros(4, 3), "w_dec": torch.zeros(3, 2, 4)},
            r"a crosscoder .*w_dec is \[3, 2, 4\]",
        ),
        ("sae_weights.safetensors", R1, "an SAE of Llama Scope R1-Distill"),
        (
            "sae_weights.safetensors",
            {"W_E": torch.zeros(4, 3), "W_D": torch.zeros(3, 4)},
            "a dictionary of llamascopium",
        ),
        (
            "x.safetensors",
            {"W": torch.zeros(4, 3), "b_enc": torch.zeros(3), "b_dec": torch.zeros(4)},
            "tied weights .*DeepSeek-R1",
        ),
        ("x.safetensors", {"pre_encoder_bias": torch.zeros(3)}, "an SAE of mlsae"),
    ],
)
@pytest.mark.parametrize("stated", [{}, {"hook": HOOK}])
def test_files_of_another_kind_are_refused_as_what_they_are(
    tmp_path: Path,
    load: Load,
    name: str,
    tensors: dict[str, Tensor],
    what: str,
    stated: dict[str, str],
) -> None:
    save_file(tensors, tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(SAEError, match=what) as caught:
            load(source, **stated)
        assert "missing configuration" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_set_of_circuit_tracer_is_refused_by_its_configuration(tmp_path: Path, load: Load) -> None:
    for layer in (0, 1):
        save_file(sae_lens_tensors("standard"), tmp_path / f"layer_{layer}.safetensors")
    (tmp_path / "config.yaml").write_text("model_kind: transcoder_set\n")
    for source in (tmp_path, tmp_path / "layer_1.safetensors"):
        with pytest.raises(SAEError, match=r"config\.yaml and .* circuit-tracer's transcoders"):
            load(source)


def test_batch_top_k_checkpoint_says_how_to_save_it_for_inference(
    tmp_path: Path, load: Load
) -> None:
    for architecture in ("batchtopk", "matryoshka_batchtopk"):
        config = sae_lens_config(architecture, k=5)
        tensors = sae_lens_tensors("standard") | {"topk_threshold": torch.tensor(0.3)}
        folder = write_sae_lens(tmp_path / architecture, config=config, tensors=tensors)
        with pytest.raises(SAEError, match=r"training checkpoint.*save_inference_model"):
            load(folder)


# Files that cannot be read


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_refused_by_that_word(tmp_path: Path, load: Load, index: bool) -> None:
    for number in (1, 2):
        save_file({"W_enc": torch.zeros(2, 2)}, tmp_path / f"sae-0000{number}-of-00002.safetensors")
    if index:
        (tmp_path / "sae.safetensors.index.json").write_text("{}")
    for source in (tmp_path, tmp_path / "sae-00001-of-00002.safetensors"):
        with pytest.raises(SAEError, match=r"split into \d shards \(sae-00001-of-00002.*merge"):
            load(source)


def test_index_of_something_else_is_no_obstacle(tmp_path: Path, load: Load) -> None:
    folder = write_sae_lens(tmp_path / "sae")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert load(folder).card.hook == HOOK


def test_colours_of_a_library_s_message_are_left_out(tmp_path: Path, load: Load) -> None:
    path = write_goodfire(tmp_path)
    torch.save({"encoder_linear.weight": torch.zeros(2, 2), "cfg": Path}, path)
    with pytest.raises(SAEError, match="not readable as tensors alone") as caught:
        load(path)
    assert "\x1b" not in str(caught.value)
    assert "[1m" not in str(caught.value)
    assert "x1b" not in str(caught.value)
    assert str(SAEError("\x1b[1;31mred\x1b[0m\x07 \u202ertl")) == "red\\x07 \\u202ertl"
