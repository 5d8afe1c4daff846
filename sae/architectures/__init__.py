"""What each architecture makes of an encoder row; one small file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from sae.architectures import direction, gated, jumprelu, standard, topk
from sae.architectures.latent import LatentVectors

__all__ = ["LATENT_VECTORS", "VECTORS", "LatentVectors", "topk"]

# The vectors [d_sae] that each architecture stores beside W_enc, W_dec and b_dec.
VECTORS: dict[str, tuple[str, ...]] = {
    "standard": standard.VECTORS,
    "jumprelu": jumprelu.VECTORS,
    "gated": gated.VECTORS,
    "topk": topk.VECTORS,
    "abstopk": topk.VECTORS,
    "direction": direction.VECTORS,
}

LATENT_VECTORS: dict[str, Callable[[Mapping[str, Tensor], Tensor], LatentVectors]] = {
    "standard": standard.latent_vectors,
    "jumprelu": jumprelu.latent_vectors,
    "gated": gated.latent_vectors,
    "topk": topk.latent_vectors,
    "abstopk": topk.latent_vectors,
    "direction": direction.latent_vectors,
}
