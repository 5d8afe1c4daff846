"""The shipped transcoder and SAE of heads: what they are, and that they fit the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae.card import HEADS, HookPoint
from sae.sae import SAE, open_sae
from sae.self_check import TEXT, VARIANCE_MARGIN, stated_by
from sae.source import SAEReference, resolve
from sae.training.activations import Window, batches, recorded
from sae.training.evaluate import reconstruction
from sae.training.model_hooks import caught
from sae.training.texts import Document
from tests.sae.oracles import oracle
from tests.small_dictionaries import SMALL_DICTIONARIES

D_MODEL = 576
MOST_BYTES = 6 * 2**20
PLACES = {
    "transcoder": ("transcoder", "blocks.14.mlp.hook_in", "blocks.14.hook_mlp_out"),
    "heads": ("sae", f"blocks.14.{HEADS}", f"blocks.14.{HEADS}"),
}


def opened(name: str) -> SAE:
    return open_sae(SAEReference(name, str(SMALL_DICTIONARIES[name])))


@pytest.fixture(scope="module")
def passing(demo_model: Path) -> dict[str, torch.Tensor]:
    """What passes the places of both on the self-check's text, by hook point: `[n, 576]`."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(demo_model)
    model: Any = AutoModel.from_pretrained(demo_model, dtype=torch.float32).eval()
    points = [HookPoint.parse(hook) for _, *hooks in PLACES.values() for hook in hooks]
    points = [*dict.fromkeys(points)]
    cut = Window(tokenizer(TEXT)["input_ids"], 0, Document("english", "", TEXT))
    ((batch, ids),) = batches([cut], pad=0)
    found = caught(model.layers, points, lambda: model(input_ids=ids, use_cache=False))
    kept = recorded(batch, ids, found[0], tokenizer.all_special_ids, None)
    return {str(point): x[kept] for point, x in zip(points, found, strict=True)}


@pytest.mark.parametrize("name", SMALL_DICTIONARIES)
def test_it_opens_as_what_it_is(name: str) -> None:
    card = opened(name).card
    assert (card.kind, card.reads, card.hook) == PLACES[name]
    assert (card.d_in, card.d_out, card.dtype) == (D_MODEL, D_MODEL, "float16")
    assert card.has_max_activations


def test_both_are_a_few_megabytes() -> None:
    files = [path for folder in SMALL_DICTIONARIES.values() for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


@pytest.mark.parametrize("name", SMALL_DICTIONARIES)
def test_it_computes_here_what_sae_lens_does(name: str, passing: dict[str, torch.Tensor]) -> None:
    sae_lens = oracle("sae_lens", "sae-lens")
    ours = opened(name)
    lens = sae_lens.SAE.load_from_disk(str(SMALL_DICTIONARIES[name]), device="cpu", dtype="float32")
    x = passing[ours.card.reads]
    given = x.view(1, len(x), 9, 64) if name == "heads" else x
    with torch.no_grad():
        f, y = lens.encode(given).view(len(x), -1), lens(given).view(len(x), -1)
    assert torch.allclose(ours.encode(x), f, rtol=1e-4, atol=1e-3)
    assert torch.allclose(ours.decode(ours.encode(x), x), y, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", SMALL_DICTIONARIES)
def test_it_reconstructs_the_demo_model_as_its_configuration_says(
    name: str, passing: dict[str, torch.Tensor]
) -> None:
    ours = opened(name)
    found = reconstruction(ours, passing[ours.card.reads], passing[ours.card.hook])
    stated = stated_by(resolve(SAEReference(name, str(SMALL_DICTIONARIES[name]))), exactly_k=False)
    assert stated.l0 is not None and stated.variance_explained is not None
    assert found.l0 == pytest.approx(stated.l0, rel=0.3)
    assert 1 - found.fvu == pytest.approx(stated.variance_explained, abs=VARIANCE_MARGIN)
