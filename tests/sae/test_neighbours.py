from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sae.sae as sae_module
from sae.neighbours import interference, nearest
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from tests.models import make_tiny_sae
from tests.sae.suites import sae_lens_config, write_sae_lens


@pytest.fixture
def sae_with(tmp_path: Path, load: Callable[..., SAE]) -> Callable[[Tensor], SAE]:
    def build(W_dec: Tensor) -> SAE:
        d_sae, d_in = W_dec.shape
        tensors = {
            "W_enc": torch.zeros(d_in, d_sae),
            "W_dec": W_dec,
            "b_enc": torch.zeros(d_sae),
            "b_dec": torch.zeros(d_in),
        }
        config = sae_lens_config("standard", d_in=d_in, d_sae=d_sae)
        return load(write_sae_lens(tmp_path, config=config, tensors=tensors))

    return build


def test_nearest_by_cosine_whatever_the_norms(sae_with: Callable[[Tensor], SAE]) -> None:
    sae = sae_with(torch.tensor([[1.0, 0], [0, 9], [3, 4], [-5, 0], [0.5, 0]]))
    found = nearest(sae, 0)
    assert [latent for latent, _ in found] == [4, 2, 1, 3]
    assert [cosine for _, cosine in found] == pytest.approx([1.0, 0.6, 0.0, -1.0])
    assert nearest(sae, 0, count=2) == found[:2]


def test_rows_without_direction_are_near_to_nothing(sae_with: Callable[[Tensor], SAE]) -> None:
    sae = sae_with(torch.tensor([[1.0, 0], [0, 0], [1, 1]]))
    assert [latent for latent, _ in nearest(sae, 0)] == [2]
    assert nearest(sae, 1) == []


def test_ties_go_to_the_lower_index_across_parts(
    sae_with: Callable[[Tensor], SAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = sae_with(torch.ones(20, 2))
    for part in (1, 3, 20):
        monkeypatch.setattr(sae_module, "WORKSPACE_BYTES", 4 * 2 * part)
        assert [latent for latent, _ in nearest(sae, 2, count=4)] == [0, 1, 3, 4]


def test_latent_past_d_sae_is_an_index_error(sae_with: Callable[[Tensor], SAE]) -> None:
    with pytest.raises(IndexError, match=r"latent 2 not in \[0, 2\)"):
        nearest(sae_with(torch.ones(2, 2)), 2)


ARCHITECTURES = ["standard", "jumprelu", "gated", "topk"]


@pytest.fixture
def always_on(tmp_path: Path) -> Callable[..., SAE]:
    """An SAE all of whose latents fire by far, so that activations are pre-activations."""

    def build(architecture: str, **how: Any) -> SAE:
        folder = make_tiny_sae(tmp_path, d_sae=24, d_in=8, architecture=architecture, k=24, **how)
        path = folder / "sae_weights.safetensors"
        tensors = load_file(path)
        for name in {"b_enc", "b_gate", "b_mag"} & tensors.keys():
            tensors[name] = tensors[name] + 50
        # As they are trained, decoder rows of different norms.
        tensors["W_dec"] = tensors["W_dec"] * torch.linspace(0.5, 3, 24)[:, None]
        save_file(tensors, path)
        return open_sae(SAEReference(name="a", source=str(folder)))

    return build


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rescaled", [False, True])
def test_interference_is_what_adding_one_unit_does_to_what_is_read_again(
    always_on: Callable[..., SAE],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    rescaled: bool,
) -> None:
    config = {"rescale_acts_by_decoder_norm": True} if rescaled and architecture == "topk" else {}
    sae = always_on(architecture, config=config)
    monkeypatch.setattr(sae_module, "WORKSPACE_BYTES", 16 * 8 * 5)
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    f = sae.encode(x)
    assert bool((f > 0).all())
    for latent in (0, 7, 23):
        more = f.clone()
        more[0, latent] += 1
        written = sae.decode(more, x) - sae.decode(f, x)
        change = (sae.encode(x + written) - f)[0]
        own, others = interference(sae, latent, count=5)
        assert own == pytest.approx(float(change[latent]), abs=1e-3)
        expected = sorted(
            (i for i in range(24) if i != latent), key=lambda i: -abs(float(change[i]))
        )
        assert [i for i, _ in others] == expected[:5]
        assert [v for _, v in others] == pytest.approx(
            [float(change[i]) for i in expected[:5]], abs=1e-3
        )


def test_interferers_of_equal_size_come_by_lower_index(
    sae_with: Callable[[Tensor], SAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = sae_with(torch.ones(20, 2))  # whose encoder is zero
    for part in (1, 3, 20):
        monkeypatch.setattr(sae_module, "WORKSPACE_BYTES", 16 * 2 * part)
        own, others = interference(sae, 2, count=4)
        assert own == 0
        assert [latent for latent, _ in others] == [0, 1, 3, 4]
    with pytest.raises(IndexError, match=r"latent 20 not in \[0, 20\)"):
        interference(sae, 20)
