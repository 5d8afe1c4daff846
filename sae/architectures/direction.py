"""A direction: f = u . x, u = v / |v|, of either sign; what it writes is u.

So ablating it takes the direction out of the stream, and adding |v| adds v.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.architectures.latent import LatentVectors, ungated

VECTORS = ()


def latent_vectors(_: Mapping[str, Tensor], shift: Tensor) -> LatentVectors:
    """Nothing is stored; shift: [n] float64, zeros. Every f is above the threshold."""
    return ungated(torch.zeros_like(shift), threshold=torch.full_like(shift, -torch.inf))
