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
    HOOK,
    sae_lens_config,
    sae_lens_tensors,
    write_gemma_scope,
    write_goodfire,
    write_sae_lens,
)

Load = Callable[..., SAE]

# Names


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("OpenMOSS/Llama-Scope-2/lorsa/8x/k128", "a Lorsa .* attends over the sequence"),
        ("tim-lawson/mlsae-pythia-70m-deduped", "an SAE of mlsae, which reads every layer"),
        ("ByteDance-Seed/Qwen3-8B-CLT", "ByteDance, .* over all layers together"),
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
        "google/gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_105",
        "google/gemma-scope-2-4b-pt/transcoder_all/layer_17_width_16k_l0_big",
        "google/gemma-scope-2-1b-it/crosscoder/layer_7_13_17_22_width_65k",
        "mntss/clt-gemma-2-2b-2.5M",
        "mwhanna/qwen3-4b-transcoders",
        "fnlp/Llama3_1-8B-Base-LXA-8x/Llama3_1-8B-Base-L0A-8x",
        # Words that only contain another.
        "colorsa/embeddings/layer_3",
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
    with pytest.raises(SAEError, match=r"by its name .* this is a transcoder.*,reads=blocks"):
        load(folder, **stated)
    places = {"reads": "blocks.3.mlp.hook_in", "writes": "blocks.3.hook_mlp_out"}
    assert load(folder, **places).card.kind == "transcoder"


def test_transcoder_is_not_made_an_sae_by_a_hook(tmp_path: Path, load: Load) -> None:
    with pytest.raises(SAEError, match=r"this is a transcoder, which reads at one place"):
        load(write_gemma_scope(tmp_path, site="transcoders"), hook=HOOK)


def test_sae_is_not_made_a_transcoder_by_its_places(tmp_path: Path, load: Load) -> None:
    with pytest.raises(SAEError, match=r"reads= and writes= state the places of a transcoder"):
        load(write_sae_lens(tmp_path), writes="blocks.3.hook_mlp_out")


@pytest.mark.parametrize("kind", ["mlp.hook_in", "ln2.hook_normalized"])
def test_nothing_is_edited_where_one_can_only_read(tmp_path: Path, load: Load, kind: str) -> None:
    lone = (write_gemma_scope(tmp_path) / "params.npz").rename(tmp_path / "params.npz")
    with pytest.raises(SAEError, match="can be read but not edited"):
        load(lone, hook=f"blocks.3.{kind}")
    with pytest.raises(SAEError, match="can be read but not edited"):
        load(lone, reads="blocks.3.hook_resid_mid", writes=f"blocks.3.{kind}")


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
        {"type": "crosscoder"},
        {"sae_type": "clt"},
        {"transcode": True},
    ],
)
@pytest.mark.parametrize("inside", ["top", "metadata"])
@pytest.mark.parametrize("stated", [{}, {"hook": HOOK}])
def test_other_kind_of_any_spelling_is_not_read_as_an_sae(
    tmp_path: Path, load: Load, said: dict[str, Any], inside: str, stated: dict[str, str]
) -> None:
    config = sae_lens_config()
    (config if inside == "top" else config["metadata"]).update(said)
    with pytest.raises(SAEError, match=r"cfg\.json: .*can only be read as an SAE"):
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


# Tensors


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"W_decs.0": torch.zeros(3, 4)}, "a cross-layer transcoder of EleutherAI's"),
        (
            {"W": torch.zeros(4, 3), "b_enc": torch.zeros(3), "b_dec": torch.zeros(4)},
            "tied weights .*DeepSeek-R1",
        ),
        ({"pre_encoder_bias": torch.zeros(3)}, "an SAE of mlsae"),
        ({"W_Q": torch.zeros(3, 4)}, "a Lorsa"),
        ({"W_enc": torch.zeros(3, 4), "W_dec_norm": torch.zeros(3)}, "such as ByteDance's"),
    ],
)
@pytest.mark.parametrize("stated", [{}, {"hook": HOOK}])
def test_files_of_a_kind_that_is_not_served_are_refused_as_what_they_are(
    tmp_path: Path, load: Load, tensors: dict[str, Tensor], what: str, stated: dict[str, str]
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    for source in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(SAEError, match=what) as caught:
            load(source, **stated)
        assert "missing configuration" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_open_sae_s_configuration_is_told_by_its_own_words(tmp_path: Path, load: Load) -> None:
    save_file({"encoder.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    said = {"input_hookpoint": "layers.3", "input_normalize": True, "k": 128}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(SAEError, match=r"config\.json: this is an SAE of OpenSAE"):
        load(tmp_path)


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
