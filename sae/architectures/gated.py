"""Gated SAE (Rajamanoharan et al. 2024a, eqs. 6 and 7), its encoders tied through r_mag:

f = [W_enc x' + b_gate > 0] * relu((W_enc * exp(r_mag)) x' + b_mag)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.architectures.latent import LatentVectors

VECTORS = ("b_gate", "b_mag", "r_mag")


def latent_vectors(stored: Mapping[str, Tensor], shift: Tensor) -> LatentVectors:
    """stored: b_gate, b_mag, r_mag [n] float64; shift: W_enc @ b_dec [n] float64."""
    gain = stored["r_mag"].exp()
    return LatentVectors(
        bias=stored["b_mag"] - gain * shift,
        gain=gain,
        threshold=torch.zeros_like(gain),
        gate_bias=stored["b_gate"] - shift,
        decoder_scale=torch.ones_like(gain),
    )
