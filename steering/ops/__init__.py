"""The edit itself: a float32 reference, kernels for CUDA and CPU, and a batched torch version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from torch import Tensor

from steering.rows import RowPool
from steering.slots import EditTable

#: Edits ``hidden_states`` in place and reads ``residual`` or None, ``[num_tokens, d_in]`` each.
BoundKernel: TypeAlias = Callable[[Tensor, Tensor | None], None]


class Kernel(Protocol):
    """A module with a kernel: `triton_kernel` or `cpu_kernel`."""

    def bound(
        self,
        *,
        token_slot: Tensor,
        positions: Tensor,
        input_ids: Tensor,
        is_special: Tensor,
        prompt_len: Tensor,
        table: EditTable,
        rows: RowPool,
        report_f: Tensor,
        reports: Tensor,
        counters: Tensor,
    ) -> BoundKernel:
        """``steer_tokens`` of buffers whose addresses stay, see `reference.steer_tokens`."""
        ...
