"""Neighbours of a feature, and the tokens it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.sae import open_sae
from sae.source import SAEReference
from server.feature_details import FeatureDetails
from server.models import FeatureDetail
from steering.unembedding import Unembedding, open_unembedding
from tests.models import D_MODEL, make_tiny_model, make_tiny_sae
from tests.sae.other_suites import write_sae_lens_transcoder


def tiny_sae(folder: Path, W_dec: torch.Tensor) -> Any:
    """An SAE with this decoder [d_sae, d_in]."""
    make_tiny_sae(folder, d_in=W_dec.shape[1], d_sae=W_dec.shape[0])
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({**tensors, "W_dec": W_dec}, folder / "sae_weights.safetensors")
    return open_sae(SAEReference(name="a", source=str(folder)))


async def test_details_are_computed_once(tmp_path: Path) -> None:
    opened = 0

    def unembedding() -> Unembedding | None:
        nonlocal opened
        opened += 1
        return None

    details = FeatureDetails(unembedding)
    sae = tiny_sae(tmp_path, torch.eye(4))
    first = await details.get(sae, 2)
    assert await details.get(sae, 2) is first
    assert await details.get(sae, 3) is not first
    assert opened == 1


async def test_feature_of_a_dictionary_that_writes_another_width_has_no_self_gain(
    tmp_path: Path,
) -> None:
    folder = write_sae_lens_transcoder(tmp_path / "t", "transcoder")
    config = json.loads((folder / "cfg.json").read_text())
    d_sae, d_out = config["d_sae"], config["d_in"] + 1
    (folder / "cfg.json").write_text(json.dumps({**config, "d_out": d_out}))
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors |= {"W_dec": torch.ones(d_sae, d_out), "b_dec": torch.zeros(d_out)}
    save_file(tensors, folder / "sae_weights.safetensors")
    sae = open_sae(SAEReference(name="t", source=str(folder)))
    details = await FeatureDetails(lambda: None).get(sae, 2)
    assert (details["self_gain"], details["interferers"]) == (None, [])
    shown = {**sae.open_features().get(2).to_json(), **details, "examples": []}
    FeatureDetail.model_validate_json(json.dumps(shown), strict=True)


def final_norm(model: Any) -> Any:
    """The norm before the unembedding, of any of the families below."""
    for path in ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError("no final norm")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, Any, Any]]:
    """A tiny checkpoint's folder, what vLLM would say of it, and its tokenizer."""

    def make(family: str) -> tuple[Path, Any, Any]:
        from transformers import AutoConfig, AutoTokenizer

        folder = make_tiny_model(tmp_path / family, family)
        config = SimpleNamespace(
            model=str(folder), revision=None, hf_text_config=AutoConfig.from_pretrained(folder)
        )
        return folder, config, AutoTokenizer.from_pretrained(folder)

    return make


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox"])
def test_logits_are_those_of_the_model_up_to_the_norms_factor(
    checkpoint: Callable[..., tuple[Path, Any, Any]], family: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, config, tokenizer = checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    unembedding = open_unembedding(config, tokenizer)
    assert unembedding is not None
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        norm, head = final_norm(model), model.get_output_embeddings().weight
        # What the direction adds: a layer norm's bias is there without it.
        expected = head @ (norm(direction) - norm(torch.zeros(D_MODEL)))
    logits = unembedding.logits(direction)
    cosine = torch.nn.functional.cosine_similarity(logits, expected[: len(logits)], dim=0)
    assert len(logits) == len(tokenizer)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)


def test_promoted_and_suppressed_are_the_ends_of_the_logits(
    checkpoint: Callable[..., tuple[Path, Any, Any]],
) -> None:
    _, config, tokenizer = checkpoint("llama")
    unembedding = open_unembedding(config, tokenizer)
    assert unembedding is not None
    direction = torch.zeros(D_MODEL)
    direction[5] = 4.0
    logits = unembedding.logits(direction / 4)
    promoted, suppressed = unembedding.strongest(direction, 10)
    assert [score for _, score in promoted] == pytest.approx(sorted(logits.tolist())[:-11:-1])
    assert [score for _, score in suppressed] == pytest.approx(sorted(logits.tolist())[:10])
    assert promoted[0][0] == tokenizer.decode([int(logits.argmax())])


def test_most_promoted_are_the_same_whatever_part_of_the_vocabulary_is_read_at_a_time(
    checkpoint: Callable[..., tuple[Path, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config, tokenizer = checkpoint("gpt2")
    unembedding = open_unembedding(config, tokenizer)
    assert unembedding is not None and unembedding.vocab_size == len(tokenizer)
    directions = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(1))
    expected = [unembedding.logits(one).topk(20).indices.tolist() for one in directions]
    assert unembedding.promoted(directions, 20).tolist() == expected
    monkeypatch.setattr("steering.unembedding.ROWS_AT_A_TIME", 7)
    assert unembedding.promoted(directions, 20).tolist() == expected
    assert unembedding.promoted(directions, 1000).shape == (3, len(tokenizer))


def test_feature_that_writes_nothing_promotes_and_suppresses_nothing(
    checkpoint: Callable[..., tuple[Path, Any, Any]],
) -> None:
    _, config, tokenizer = checkpoint("llama")
    unembedding = open_unembedding(config, tokenizer)
    assert unembedding is not None
    assert unembedding.strongest(torch.zeros(D_MODEL), 10) == ([], [])


def test_sharded_checkpoint_is_read_where_its_index_says(
    checkpoint: Callable[..., tuple[Path, Any, Any]],
) -> None:
    folder, config, tokenizer = checkpoint("llama")
    whole = open_unembedding(config, tokenizer)
    assert whole is not None
    expected = whole.logits(torch.ones(D_MODEL))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {"lm_head.weight": "b.safetensors"}
    weight_map = {name: shards.get(name, "a.safetensors") for name in tensors}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    sharded = open_unembedding(config, tokenizer)
    assert sharded is not None
    torch.testing.assert_close(sharded.logits(torch.ones(D_MODEL)), expected)


@pytest.mark.parametrize(
    "damage",
    [
        {"lm_head.weight": torch.zeros(320, 64, dtype=torch.int8)},
        {"lm_head.weight": torch.zeros(320, 32)},
        {"model.norm.weight": None},
        {"other.norm.weight": torch.ones(64)},
    ],
    ids=["quantized", "misshaped", "no norm", "two norms"],
)
def test_checkpoint_that_does_not_show_its_head_promotes_nothing(
    checkpoint: Callable[..., tuple[Path, Any, Any]], damage: dict[str, torch.Tensor | None]
) -> None:
    folder, config, tokenizer = checkpoint("llama")
    tensors = {**load_file(folder / "model.safetensors"), **damage}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    assert open_unembedding(config, tokenizer) is None


def test_folder_without_weights_promotes_nothing(tmp_path: Path) -> None:
    for model in (str(tmp_path), "/nowhere", "nobody/has-this-model"):
        config = SimpleNamespace(
            model=model, revision=None, hf_text_config=SimpleNamespace(hidden_size=64)
        )
        assert open_unembedding(config, tokenizer=object()) is None


# What is written before the end of a branch


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "glm4", "olmo2"])
@pytest.mark.parametrize("kind", ["attn.hook_z", "attn.hook_out", "mlp.hook_out", "hook_mlp_out"])
def test_what_is_written_in_a_branch_enters_the_stream_as_the_model_makes_it(
    checkpoint: Callable[..., tuple[Path, Any, Any]], family: str, kind: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, config, tokenizer = checkpoint(family)
    unembedding = open_unembedding(config, tokenizer)
    assert unembedding is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    layer = (model.transformer.h if family == "gpt2" else model.model.layers)[2]
    projection = layer.attn.c_proj if family == "gpt2" else layer.self_attn.o_proj
    names = {
        "attn.hook_z": {"gemma3": "post_attention_layernorm", "glm4": "post_self_attn_layernorm"},
        "mlp.hook_out": {"gemma3": "post_feedforward_layernorm", "glm4": "post_mlp_layernorm"},
    }
    names["attn.hook_z"]["olmo2"] = "post_attention_layernorm"
    names["mlp.hook_out"]["olmo2"] = "post_feedforward_layernorm"
    names["attn.hook_out"] = names["attn.hook_z"]
    norm = getattr(layer, names.get(kind, {}).get(family, ""), None)
    rng = torch.Generator().manual_seed(3)
    heads = projection.weight.numel() // D_MODEL
    row = torch.randn(1, heads if kind == "attn.hook_z" else D_MODEL, generator=rng)
    with torch.inference_mode():
        change = row.double()
        if kind == "attn.hook_z":
            change = projection(change) - projection(torch.zeros_like(change))
        if norm is not None:
            # A branch at right angles to the change, of which the norm takes nothing away.
            y = torch.randn(1, D_MODEL, generator=rng).double()
            y -= (y @ change.T) / (change @ change.T) * change
            change = norm(y + 1e-3 * change) - norm(y)
    found = unembedding.in_stream(row, f"blocks.2.{kind}")
    assert found is not None
    cosine = torch.nn.functional.cosine_similarity(found.double(), change, dim=1)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)


async def test_feature_of_heads_promotes_what_their_projection_makes_of_it(
    checkpoint: Callable[..., tuple[Path, Any, Any]], tmp_path: Path
) -> None:
    folder, config, tokenizer = checkpoint("llama")
    path = make_tiny_sae(tmp_path / "z", layer=2, hook_kind="attn.hook_z", d_in=128)
    sae = open_sae(SAEReference(name="z", source=str(path)))
    found = await FeatureDetails(lambda: open_unembedding(config, tokenizer)).get(sae, 5)
    unembedding = open_unembedding(config, tokenizer)
    assert unembedding is not None
    tensors = load_file(folder / "model.safetensors")
    W_O = tensors["model.layers.2.self_attn.o_proj.weight"]
    written = W_O @ load_file(path / "sae_weights.safetensors")["W_dec"][5]
    for (token, score), wanted in zip(
        found["promoted"], unembedding.strongest(written, 10)[0], strict=True
    ):
        assert [token, score] == [wanted[0], pytest.approx(wanted[1], abs=1e-5)]
    save_file(
        {**tensors, "model.layers.2.self_attn.o_proj.weight": W_O.to(torch.int8)},
        folder / "model.safetensors",
    )
    hidden = await FeatureDetails(lambda: open_unembedding(config, tokenizer)).get(sae, 5)
    assert hidden["promoted"] == hidden["suppressed"] == []
    assert hidden["nearest"] == found["nearest"]
