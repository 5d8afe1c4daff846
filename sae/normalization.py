"""Normalization of an SAE's input at run time, and its undoing at the output (SAELens' rules).

layer_norm:             x_in = (x - mu) / (sigma + 1e-5), sigma unbiased;  out * sigma + mu
constant_norm_rescale:  x_in = x * sqrt(d_in) / |x|;                       out * |x| / sqrt(d_in)
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5


def normalize(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, d_in] float32 -> (x_in [n, d_in], g [n]): g is the scale of the SAE's output."""
    if kind == "none":
        return x, x.new_ones(x.shape[0])
    if kind == "layer_norm":
        centred = x - x.mean(dim=-1, keepdim=True)
        sigma = centred.std(dim=-1, keepdim=True)
        return centred / (sigma + LAYER_NORM_EPS), sigma.squeeze(-1)
    assert kind == "constant_norm_rescale", kind
    g = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    # A zero row has no direction: it stays zero, as padding does.
    return x / g.clamp(min=torch.finfo(x.dtype).tiny), g.squeeze(-1)


def denormalize(kind: str, out: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """Bring the SAE's output [n, d_in] back to the scale of the x [n, d_in] it came from."""
    if kind == "none":
        return out
    out = out * g.unsqueeze(-1)
    return out + x.mean(dim=-1, keepdim=True) if kind == "layer_norm" else out
