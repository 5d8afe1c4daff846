"""Attention's heads under tensor parallelism: each rank has its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from vllm.distributed.communication_op import tensor_model_parallel_all_gather


@dataclass(frozen=True)
class RankHeads:
    """The outputs of the heads, of which each rank of a tensor-parallel group has as many.

    They are gathered, so that every rank reads what a single one would, bit for bit, whatever is
    done there; each keeps its own part of what is made of them.

    Attributes:
        ranks: of the group.
        rank: this one.
    """

    ranks: int
    rank: int

    def gathered(self, own: Tensor) -> Tensor:
        """``[num_tokens, d / ranks]`` of this rank to ``[num_tokens, d]``, in memory of its own."""
        whole: Tensor = tensor_model_parallel_all_gather(own.contiguous(), dim=-1)
        return whole

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of what `gathered` gave."""
        width = whole.shape[-1] // self.ranks
        return whole[:, self.rank * width : (self.rank + 1) * width]
