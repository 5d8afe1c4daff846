"""A model's output head, outside of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor, nn


class OutputHead:
    """Logits of final hidden states as the model itself makes them, soft cap included.

    A LoRA adapter of the head is left out: vLLM would apply those that the last pass's batch used.

    Args:
        model: the loaded model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def __call__(self, hidden_states: Tensor) -> Tensor | None:
        """``[n, vocabulary]`` logits; None on a rank to which they are not gathered.

        All tensor-parallel ranks must take part.

        Args:
            hidden_states: ``[n, d]``, what the model returned.
        """
        with self._without_lora():
            logits: Tensor | None = self._model.compute_logits(hidden_states)
        return logits

    @cached_property
    def _lora_wrappers(self) -> list[Any]:
        from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA

        return [
            module.punica_wrapper
            for module in self._model.modules()
            if isinstance(module, LogitsProcessorWithLoRA)
        ]

    @contextmanager
    def _without_lora(self) -> Iterator[None]:
        for wrapper in self._lora_wrappers:
            wrapper.add_lora_logits = _unchanged
        try:
            yield
        finally:
            for wrapper in self._lora_wrappers:
                del wrapper.add_lora_logits


def _unchanged(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits
