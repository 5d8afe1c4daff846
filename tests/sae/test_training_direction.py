"""Control vectors that the recipe makes, against means taken by hand and gguf's own reader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from sae.layers import resolve_all
from sae.sae import open_sae
from sae.source import parse_source
from sae.training import direction
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_model

POSITIVE = ("The quick brown fox jumps.", "He said nothing, and there was snow on the trees.")
NEGATIVE = ("In 1984 the weather was cold.", "What is the capital of France?")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@torch.no_grad()
def mean_by_hand(model: Any, tokenizer: Any, texts: tuple[str, ...], layer: int) -> torch.Tensor:
    """Over all tokens but each text's first, one text at a time."""
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        rows.append(model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1][0, 1:])
    return torch.cat(rows).mean(dim=0)


def test_a_control_vector_is_the_difference_of_means_and_is_read_here_and_by_gguf(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel, AutoTokenizer

    paths = []
    for name, texts in (("positive", POSITIVE), ("negative", NEGATIVE)):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n\n".join(texts) + "\n")
        paths += [f"--{name}", str(path)]
    file = tmp_path / "made.gguf"
    monkeypatch.setattr(
        sys, "argv", ["direction", "--model", str(model_folder), *paths, "--output", str(file)]
    )
    direction.main()

    read = gguf.GGUFReader(file)
    architecture = read.fields["general.architecture"].contents()
    assert architecture == "controlvector"
    assert read.fields["controlvector.layer_count"].contents() == NUM_LAYERS - 1
    vectors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    assert sorted(vectors) == ["direction.1", "direction.2", "direction.3"]

    model: Any = AutoModel.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    # What hidden_states has after the last layer is normalized: not the stream.
    for layer in (1, 2):
        positive, negative = (
            mean_by_hand(model, tokenizer, texts, layer) for texts in (POSITIVE, NEGATIVE)
        )
        expected = positive - negative
        assert torch.allclose(vectors[f"direction.{layer}"], expected, rtol=1e-4, atol=1e-4)

    opened = [open_sae(ref) for ref in resolve_all(parse_source(f"{file},layer=all"))]
    assert [sae.card.id for sae in opened] == ["made.gguf.1", "made.gguf.2", "made.gguf.3"]
    for layer, sae in enumerate(opened, start=1):
        assert (sae.card.kind, sae.card.d_in) == ("direction", D_MODEL)
        assert sae.card.hook == f"blocks.{layer}.hook_resid_post"
        length = sae.open_features().max_activation(0)
        assert length == pytest.approx(float(vectors[f"direction.{layer}"].norm()))


def test_a_sink_takes_no_part_in_a_mean() -> None:
    x = torch.ones(5, 4)
    x[2] = 1000.0
    assert torch.equal(direction._mean_without_sinks(x), torch.ones(4))


def test_texts_of_a_single_token_are_refused(model_folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with pytest.raises(ValueError, match="hold no token that counts"):
        direction.mean_stream(model, tokenizer, ["a"], [1])
