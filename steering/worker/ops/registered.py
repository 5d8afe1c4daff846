"""The op that the model calls at a hooked layer: opaque to torch.compile, in place.

``vllm_sae::steer(Tensor(a!) hidden_states, Tensor? residual, str hook) -> ()``
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
from torch import Tensor

NAMESPACE: Final = "vllm_sae"


class Applier(Protocol):
    """What carries out the edits at hook points: a worker's steering."""

    def apply_at(self, hook: str, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Edit ``hidden_states`` in place."""
        ...


_current: list[Applier] = []


def make_current(applier: Applier) -> None:
    """Say whose forward pass comes next: a process may hold several engines."""
    _current[:] = [applier]


def _steer(hidden_states: Tensor, residual: Tensor | None, hook: str) -> None:
    if _current:
        _current[0].apply_at(hook, hidden_states, residual)


def _steer_fake(hidden_states: Tensor, residual: Tensor | None, hook: str) -> None:
    """Shapes do not change."""


_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_library.define("steer(Tensor(a!) hidden_states, Tensor? residual, str hook) -> ()")
_library.impl("steer", _steer, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::steer", _steer_fake, lib=_library)

steer = torch.ops.vllm_sae.steer


def steer_wide(hidden_states: Tensor, residual: Tensor | None, hook: str) -> Tensor:
    """`steer` for a place where a norm makes ``hidden_states``.

    A compiled graph keeps such an output in float32 until it is stored, and the addition that
    follows takes it from the registers. The op makes the graph store it. If it were stored in the
    model's dtype, the addition would read it rounded, and unsteered requests would differ from
    those of a graph without the op. So it is stored in float32: the compiler leaves out the
    conversion to the model's dtype and back.

    Args:
        hidden_states: ``[num_tokens, d_in]`` model dtype; outside of torch.compile edited in place.
        residual: the same shape, or None; only read.
        hook: the hook point.

    Returns:
        The edited hidden states, ``[num_tokens, d_in]`` model dtype, which take the place of
        ``hidden_states``.
    """
    if hidden_states.dtype == torch.float32 or not torch.compiler.is_compiling():
        steer(hidden_states, residual, hook)
        return hidden_states
    wide = hidden_states.float()
    steer(wide, residual, hook)
    return wide.to(hidden_states.dtype)
