"""Runs part of a full pass in vLLM's profile run, so that the KV cache leaves room for one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steering.worker.worker_state import SteeringState


def rehearse_full_passes(runner: Any, state: SteeringState) -> None:
    """Have the runner's profile run encode and decode with the largest SAE of each kind.

    This happens at the SAE's hook point, while the layers' own activations are held, as in a pass
    that needs it.

    Args:
        runner: the worker's model runner.
        state: the worker's steering, installed in the model.
    """
    profile_run = runner.profile_run

    def _profile_run(*args: Any, **kwargs: Any) -> Any:
        apply_at = state.apply_at

        def _apply_at(hook: str, hidden_states: Tensor, residual: Tensor | None) -> None:
            apply_at(hook, hidden_states, residual)
            for sae in largest.get(hook, ()):
                state.hooks[hook].rehearse(sae, hidden_states.flatten(0, -2))

        largest = _largest(state)
        state.apply_at = _apply_at  # type: ignore[method-assign]
        try:
            return profile_run(*args, **kwargs)
        finally:
            state.apply_at = apply_at  # type: ignore[method-assign]

    runner.profile_run = _profile_run


def _largest(state: SteeringState) -> dict[str, list[int]]:
    """The SAEs to rehearse by hook point: the largest of those with TopK, and of the others."""
    largest: dict[bool, tuple[int, str, int]] = {}
    for hook, site in state.hooks.items():
        for index, sae in site.saes.items():
            kind = sae.card.exact_from_row
            largest[kind] = max((sae.card.d_sae, hook, index), largest.get(kind, (0, "", 0)))
    found: dict[str, list[int]] = {}
    for _, hook, index in largest.values():
        found.setdefault(hook, []).append(index)
    return found
