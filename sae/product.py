"""Products of float32 matrices for full passes, through oneDNN on a CPU.

Torch's own product there is MKL's, which on AMD's processors takes two to three times as long (seen
on an EPYC, Zen 5); vLLM's own linear layers go through oneDNN too. Both are float32 throughout.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

# What torch.compile calls for a linear layer; no public name reaches it with a plain weight.
_linear: Final[Any] = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    else None
)


def product(x: Tensor, rows: Tensor) -> Tensor:
    """``x @ rows.T``: x [n, k] and rows [m, k], float32 on one device -> [n, m]. No gradient."""
    # A part of a matrix that is stored by columns oneDNN multiplies by its reference code, hundreds
    # of times as slow as any other way.
    dense = rows.is_contiguous() or rows.T.is_contiguous()
    if _linear is None or x.device.type != "cpu" or not dense or not x.numel() or not rows.numel():
        return x @ rows.T
    found: Tensor = _linear(x, rows, None, "none", [], "")
    return found
