"""Watches the passes that vLLM runs before it serves: every installed op must be called in each.

This finds what reading the code cannot: a module that its layer calls by another method, layers
that run several times or are skipped, a stream of another shape, and a compiled graph from a cache
that was made without the op. Once the engine is ready the watch ends, so it costs requests nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from steering.vllm.unsupported import UnsupportedModelError
from steering.worker.worker_state import SteeringState


class PassGuard:
    """Watches the calls of ``state.apply_at`` until `leave`.

    Args:
        state: the worker's steering.
        model: the whole model; each call of it is a pass.
        replayed: whether passes may be replayed from graphs, so that no op is called from Python.

    Attributes:
        passes: how many passes have ended so far.
    """

    def __init__(self, state: SteeringState, model: nn.Module, *, replayed: bool) -> None:
        self.passes = 0
        self._state = state
        self._replayed = replayed
        self._counts = dict.fromkeys(state.hooks, 0)
        self._ever = dict.fromkeys(state.hooks, 0)
        self._tokens: int | None = None  # of this pass, as the first op saw it
        self._wrong: str | None = None
        self._apply = state.apply_at
        state.apply_at = self._watch  # type: ignore[method-assign]
        self._handle = model.register_forward_hook(self._end_of_pass)

    def leave(self) -> None:
        """Stop watching."""
        self._handle.remove()
        del self._state.apply_at

    def check(self) -> None:
        """Check that every op has been called, if any pass has been run.

        Raises:
            UnsupportedModelError: if one has not, or if something was wrong in a pass. It names the
                hook point.
        """
        if self._wrong is not None:
            raise UnsupportedModelError(self._wrong)
        if self.passes == 0 and not any(self._ever.values()):
            return
        missing = [hook for hook, count in self._ever.items() if not count]
        if missing:
            raise UnsupportedModelError(_never_called(missing[0]))

    def _watch(self, hook: str, hidden_states: Tensor, residual: Tensor | None) -> None:
        self._counts[hook] += 1
        self._ever[hook] += 1
        if self._wrong is None:
            self._wrong = self._misshapen(hook, hidden_states, residual)
        if self._wrong is None:
            self._apply(hook, hidden_states, residual)

    def _misshapen(self, hook: str, hidden_states: Tensor, residual: Tensor | None) -> str | None:
        """What is wrong with a stream; it must be ``[num_tokens, d]`` or ``[1, num_tokens, d]``."""
        shape = tuple(hidden_states.shape)
        plain = len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)
        width = self._state.hooks[hook].width
        if not plain or shape[-1] != width or shape[-2] > self._state.max_num_tokens:
            return (
                f"{hook}: the stream there has shape {list(shape)}, not [tokens, {width}] with at "
                f"most {self._state.max_num_tokens} tokens"
            )
        if residual is not None and tuple(residual.shape) != shape:
            return (
                f"{hook}: the residual there has shape {list(residual.shape)}, but the hidden "
                f"states have {list(shape)}"
            )
        if self._tokens not in (None, shape[-2]):
            return (
                f"{hook}: the stream there has {shape[-2]} tokens in a pass that has "
                f"{self._tokens} elsewhere"
            )
        self._tokens = shape[-2]
        return None

    def _end_of_pass(self, *_: Any) -> None:
        self.passes += 1
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        self._tokens = None
        if self._wrong is None:
            self._wrong = _miscounted(counts, self._replayed)
        if self._wrong is not None:
            raise UnsupportedModelError(self._wrong)


def _miscounted(counts: Mapping[str, int], replayed: bool) -> str | None:
    """What is wrong with the calls of a pass: each op once, or none at all if it is replayed."""
    found = set(counts.values())
    if found == {1} or (replayed and found == {0}):
        return None
    hook, count = max(counts.items(), key=lambda item: item[1])
    if count > 1:
        return f"{hook}: its layer is run {count} times in one pass, and would be edited each time"
    return _never_called(next(hook for hook, count in counts.items() if not count))


def _never_called(hook: str) -> str:
    return (
        f"{hook}: the model ran without calling the place of the edit: its layer takes another "
        "way, or vLLM's compile cache holds the model without it (VLLM_DISABLE_COMPILE_CACHE=1 "
        "bypasses the cache)"
    )
