"""Keeps logits free of NaN and infinity, which an edit too large for the stream's dtype may cause.

No bound on a request's values rules this out: float16 ends at 65,504, and the effects of edits at
several layers multiply. vLLM would answer a request for log-probabilities with a server error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from steering.worker.worker_state import SteeringState

_METHODS: Final = ("compute_logits", "compute_logits_local")


def keep_logits_finite(model: nn.Module, state: SteeringState) -> None:
    """While a steered request runs, take NaN for 0 and infinity for the largest finite number.

    A row that is all NaN becomes an even distribution. Minus infinity stays, since it rules a token
    out.

    Args:
        model: the loaded model; its methods are replaced in this instance.
        state: the worker's steering.
    """
    for name in _METHODS:
        compute = getattr(model, name, None)
        if compute is not None:
            setattr(model, name, _finite(compute, state))


def _finite(compute: Callable[..., Tensor | None], state: SteeringState) -> Callable[..., Any]:
    @functools.wraps(compute)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor | None:
        logits = compute(*args, **kwargs)
        if logits is not None and state.slots.in_use:
            largest = torch.finfo(logits.dtype).max
            logits.nan_to_num_(nan=0.0, posinf=largest, neginf=-torch.inf)
        return logits

    return wrapper
