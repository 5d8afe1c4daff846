"""Attention's heads under tensor parallelism: each rank has some of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from vllm.distributed.communication_op import tensor_model_parallel_all_gather


@dataclass(frozen=True)
class RankHeads:
    """The outputs of the heads, of which each rank of a tensor-parallel group has an equal part.

    They are gathered, so that every rank reads what a single one would, bit for bit, whatever is
    done there; each rank keeps its own part of the result.

    Attributes:
        ranks: how many ranks the group has.
        rank: which of them this one is.
    """

    ranks: int
    rank: int

    def gathered(self, part: Tensor) -> Tensor:
        """See `SharedHeads.gathered`."""
        whole: Tensor = tensor_model_parallel_all_gather(part.contiguous(), dim=-1)
        return whole

    def part_of(self, whole: Tensor) -> Tensor:
        """See `SharedHeads.part_of`."""
        width = whole.shape[-1] // self.ranks
        return whole[:, self.rank * width : (self.rank + 1) * width]
