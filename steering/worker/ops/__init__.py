"""The edit itself: a float32 reference, kernels for CUDA and CPU, and a batched torch version."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from steering.worker.rows import RowPool
from steering.worker.slots import EditTable

#: Edits ``hidden_states`` in place and reads ``residual`` or None, ``[num_tokens, d_in]`` each.
BoundKernel: TypeAlias = Callable[[Tensor, Tensor | None], None]


class Buffers(NamedTuple):
    """What a kernel is given beside the streams, as `reference.steer_tokens` says; none moves."""

    token_slot: Tensor
    positions: Tensor
    input_ids: Tensor
    is_special: Tensor
    prompt_len: Tensor
    table: EditTable
    rows: RowPool
    report_f: Tensor | None = None
    reports: Tensor | None = None
    counters: Tensor | None = None


class Kernel(Protocol):
    """A module with a kernel: `triton_kernel` or `cpu_kernel`."""

    def bound(self, buffers: Buffers) -> BoundKernel:
        """``steer_tokens`` of buffers that stay where they are."""
        ...
