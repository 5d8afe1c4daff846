"""JumpReLU SAE: f = relu(h) * [h > threshold], strictly (Rajamanoharan et al. 2024b, eq. 3).

BatchTopK and Matryoshka SAEs are published in this form, with one threshold for all latents.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sae.architectures.latent import LatentVectors, ungated

VECTORS = ("b_enc", "threshold")


def latent_vectors(stored: Mapping[str, Tensor], shift: Tensor) -> LatentVectors:
    """stored: b_enc, threshold [n] float64; shift: W_enc @ b_dec [n] float64."""
    # relu(h) is 0 below 0, so a negative threshold is no different from 0.
    return ungated(stored["b_enc"] - shift, threshold=stored["threshold"].clamp(min=0))
