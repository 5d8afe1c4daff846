"""What every version of the edit works on, and what a module with a kernel offers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from steering.worker.gates import GateState, GateTable
from steering.worker.ops.layout import INPUT_PLAIN
from steering.worker.rows import Rows
from steering.worker.slots import EditTable, SlotFacts

#: Takes ``hidden_states`` and ``residual`` or None, ``[num_tokens, d_in]`` each.
OnStream: TypeAlias = Callable[[Tensor, Tensor | None], None]


class InputNorm(NamedTuple):
    """The norm that a hook point follows. The op stands before that norm, so it applies it itself.

    Attributes:
        kind: INPUT_PLAIN for no norm; INPUT_RMS for ``x / sqrt(mean(x^2) + eps)``; INPUT_LAYER for
            the same of ``x - mean(x)``. The norm's gain and bias are not applied.
        eps: added under the root.
    """

    kind: int = INPUT_PLAIN
    eps: float = 0.0


class Buffers(NamedTuple):
    """What every version of the edit works on at one hook point, besides the stream.

    None of it moves, since CUDA graphs and bound kernels hold the addresses.

    Attributes:
        token_slot: ``[>= num_tokens]`` int32, slot of each token, NO_SLOT if it has none.
        positions: ``[>= num_tokens]`` int64, position in the sequence.
        input_ids: ``[>= num_tokens]`` int32, token ids.
        is_special: ``[vocab_size]`` bool, by token id.
        slots: what holds for a whole request.
        table: every slot's edits that are added here.
        reads: every slot's edits that are read here and added at other hook points.
        gates: every slot's conditions that are read here.
        gate_state: what is known of all slots' conditions, at all hook points.
        rows: the rows of the features in use.
        f: ``[>= num_tokens, MAX_ENTRIES]`` float32. On tokens of slots that report, the column of
            each edit of this hook point gets the activation before the edit, or NOT_COVERED,
            SKIPPED_SINK or HELD_BACK. The column of each gate that is read here gets its activation
            on every token where it could have an event. Nothing else is written.
        share: ``[>= num_tokens]`` float32, of any stride. On tokens of slots that report and have
            edits here: the norm of the change over that of the stream, negative if ``max_share``
            limited it, NOT_EDITED if there was no change.
        carried: ``[>= num_tokens, MAX_INTERVENTIONS]`` float32, by index of the edit in its
            request. For edits that are read at one hook point and added at another: what is to be
            added, as a factor of the edit's row of W_dec, or SKIPPED_SINK. It is written on the
            tokens that the edit covers. None if every SAE of this hook point both reads and writes
            here.
        counters: ``[2]`` int64, added to: the tokens that some edit changed, and the tokens that
            some edit would have changed if they were not sinks.
        limit: see `layout.FLOAT16_LIMIT`; infinite if the stream's dtype needs none.
        input_norm: what the stream goes through before it is read here. No edit is added at a hook
            point that has one.
    """

    token_slot: Tensor
    positions: Tensor
    input_ids: Tensor
    is_special: Tensor
    slots: SlotFacts
    table: EditTable
    reads: EditTable
    gates: GateTable
    gate_state: GateState
    rows: Rows
    f: Tensor
    share: Tensor
    carried: Tensor | None
    counters: Tensor
    limit: float = math.inf
    input_norm: InputNorm = InputNorm()


class BoundKernel(NamedTuple):
    """The three functions of a kernel, bound to the buffers of one hook point.

    Attributes:
        read_gates: as `reference.read_gates`.
        read_edits: as `reference.read_edits`.
        steer: as `reference.steer_tokens`.
    """

    read_gates: OnStream
    read_edits: OnStream
    steer: OnStream


class Kernel(Protocol):
    """A module with a kernel: `triton_kernel` or `cpu_kernel`."""

    def bound(self, buffers: Buffers) -> BoundKernel:
        """Bind the kernel to buffers that stay where they are."""
        ...
