"""TopK SAE (Gao et al. 2024, eq. 3) and AbsTopK SAE (arXiv 2510.00404): every h is needed.

topk:    f_i = relu(h_i) if h_i is among the token's k largest, else 0
abstopk: f_i = h_i       if |h_i| is among the token's k largest, else 0
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.architectures.latent import LatentVectors, ungated

VECTORS = ("b_enc",)


def latent_vectors(stored: Mapping[str, Tensor], shift: Tensor) -> LatentVectors:
    """stored: b_enc [n] float64; shift: W_enc @ b_dec [n] float64. `z + bias` is h."""
    bias = stored["b_enc"] - shift
    return ungated(bias, threshold=torch.zeros_like(bias))


def select(h: Tensor, k: int, *, signed: bool) -> Tensor:
    """Zero all but each row's k largest, in place: [n, d_sae] float32 -> the same tensor.

    signed: rank by magnitude and keep the sign (abstopk); otherwise rank by value, then relu.
    """
    indices = torch.topk(h.abs() if signed else h, k, dim=-1, sorted=False).indices
    kept = h.gather(-1, indices)
    return h.zero_().scatter_(-1, indices, kept if signed else kept.relu())
