"""A direction v: with u = v / |v|, f = u . x, of either sign, and W_dec is u.

So ablating it takes the direction out of the stream, and adding |v| adds v.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.architectures.latent import LatentVectors, ungated

VECTORS = ()


def latent_vectors(_: Mapping[str, Tensor], shift: Tensor) -> LatentVectors:
    """Nothing is stored; shift: [n] float64, zeros. The threshold is -inf: every f passes."""
    return ungated(torch.zeros_like(shift), threshold=torch.full_like(shift, -torch.inf))
