"""Standard SAE: f = relu(h), h = W_enc (x - b_dec) + b_enc (Bricken et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.architectures.latent import LatentVectors, ungated

VECTORS = ("b_enc",)


def latent_vectors(stored: Mapping[str, Tensor], shift: Tensor) -> LatentVectors:
    """stored: b_enc [n] float64; shift: W_enc @ b_dec [n] float64, zero where not subtracted."""
    bias = stored["b_enc"] - shift
    return ungated(bias, threshold=torch.zeros_like(bias))
