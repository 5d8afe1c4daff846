from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sae.weights as weights_module
from sae.neighbours import nearest
from sae.sae import SAE
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
        monkeypatch.setattr(weights_module, "WORKSPACE_BYTES", 4 * 2 * part)
        assert [latent for latent, _ in nearest(sae, 2, count=4)] == [0, 1, 3, 4]


def test_latent_past_d_sae_is_an_index_error(sae_with: Callable[[Tensor], SAE]) -> None:
    with pytest.raises(IndexError, match=r"latent 2 not in \[0, 2\)"):
        nearest(sae_with(torch.ones(2, 2)), 2)
