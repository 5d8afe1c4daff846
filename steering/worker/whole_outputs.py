"""Whole reconstructions by dictionaries that write elsewhere, on their way to where they write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WholeOutput:
    """One dictionary's output for each token of the batch; arbitrary for tokens that need none.

    Attributes:
        decoded: ``[num_tokens, d_out]`` float32, ``decode(f)`` before any edit, skip included.
        l0: ``[num_tokens]`` int64, how many of its features fire.
        covered: ``[num_tokens]`` bool, whether a read covers the token.
    """

    decoded: Tensor
    l0: Tensor
    covered: Tensor


class WholeOutputs:
    """The outputs of the pass under way, by index of the dictionary."""

    def __init__(self) -> None:
        self._of_sae: dict[int, WholeOutput] = {}

    def forget(self) -> None:
        """The pass is over."""
        self._of_sae.clear()

    def take(self, sae: int) -> WholeOutput:
        """The output that was left at the place where the dictionary reads."""
        return self._of_sae[sae]

    def leave(self, sae: int, num_tokens: int, d_out: int, device: torch.device) -> WholeOutput:
        """Make room for all tokens of the pass; each part of the batch fills in its own.

        Args:
            sae: index of the dictionary.
            num_tokens: tokens of the pass.
            d_out: elements of the stream where the dictionary writes.
            device: where the model runs.
        """
        if sae not in self._of_sae:
            self._of_sae[sae] = WholeOutput(
                torch.empty(num_tokens, d_out, dtype=torch.float32, device=device),
                torch.zeros(num_tokens, dtype=torch.int64, device=device),
                torch.zeros(num_tokens, dtype=torch.bool, device=device),
            )
        return self._of_sae[sae]
