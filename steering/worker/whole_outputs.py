"""What dictionaries that write elsewhere make of whole tokens, on its way to where they write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WholeOutput:
    """One dictionary's, by token of the batch; of tokens that need none it is whatever was there.

    Attributes:
        decoded: ``[num_tokens, d_out]`` float32, ``decode(f)`` before any edit, skip included.
        l0: ``[num_tokens]`` int64, how many features fire.
        covered: ``[num_tokens]`` bool, whether a read covers the token.
    """

    decoded: Tensor
    l0: Tensor
    covered: Tensor


class WholeOutputs:
    """Those of the pass under way, by the dictionary's index; passes without any hold nothing."""

    def __init__(self) -> None:
        self._of_sae: dict[int, WholeOutput] = {}

    def forget(self) -> None:
        """The pass is over."""
        self._of_sae.clear()

    def take(self, sae: int) -> WholeOutput:
        """What was left where the dictionary reads."""
        return self._of_sae[sae]

    def leave(self, sae: int, num_tokens: int, d_out: int, device: torch.device) -> WholeOutput:
        """Room for all tokens of the pass, in which parts of it are filled in one by one."""
        if sae not in self._of_sae:
            self._of_sae[sae] = WholeOutput(
                torch.empty(num_tokens, d_out, dtype=torch.float32, device=device),
                torch.zeros(num_tokens, dtype=torch.int64, device=device),
                torch.zeros(num_tokens, dtype=torch.bool, device=device),
            )
        return self._of_sae[sae]
