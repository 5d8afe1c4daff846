"""What every version of the edit takes, and what a kernel gives."""

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
    """What a hook point is behind: the place hooked is what the norm is given.

    Attributes:
        kind: INPUT_PLAIN; INPUT_RMS: ``x / sqrt(mean(x^2) + eps)``; INPUT_LAYER: that of
            ``x - mean(x)``. The norm's gain and bias come later.
        eps: added below the root.
    """

    kind: int = INPUT_PLAIN
    eps: float = 0.0


class Buffers(NamedTuple):
    """What every version of the edit at one hook point works on beside the stream; none moves.

    Attributes:
        token_slot: ``[>= num_tokens]`` int32, slot of each token, NO_SLOT for none.
        positions: ``[>= num_tokens]`` int64, position in the sequence.
        input_ids: ``[>= num_tokens]`` int32, token ids.
        is_special: ``[vocab_size]`` bool.
        slots: what holds for a whole request.
        table: every slot's edits that are added here.
        reads: every slot's edits that are read here and added at other hook points.
        gates: every slot's conditions that are read here.
        gate_state: what all hook points know of all slots' conditions.
        rows: the features' rows.
        f: ``[>= num_tokens, MAX_ENTRIES]`` float32. For tokens of slots that report, each edit's
            column gets its activation before the edit, or NOT_COVERED, SKIPPED_SINK, HELD_BACK;
            each gate's column its activation, where it could have had its event. Nothing else is
            written: not the columns of other hook points, nor other tokens.
        share: ``[>= num_tokens]`` float32, any stride. For tokens of slots that report and have
            edits here: the norm of the change over that of the stream, negative where `max_share`
            limited it, NOT_EDITED where there was none.
        carried: ``[>= num_tokens, MAX_INTERVENTIONS]`` float32, by the request's edits, of those
            that are read at one hook point and added at another: what is added, in units of their
            rows of W_dec, or SKIPPED_SINK. Written where an edit covers the token. None where every
            SAE that is here reads and writes here.
        input_norm: what the stream goes through before it is read here; nothing is added behind
            one.
        counters: ``[2]`` int64; +1 for each token that some edit touched, and +1 for each that
            some edit would have touched but for a sink.
        limit: see `layout.FLOAT16_LIMIT`; infinite where the dtype of the stream needs none.
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
    """A kernel of one hook point, bound to its buffers.

    Attributes:
        read_gates: `reference.read_gates` of them.
        read_edits: `reference.read_edits` of them.
        steer: `reference.steer_tokens` of them.
    """

    read_gates: OnStream
    read_edits: OnStream
    steer: OnStream


class Kernel(Protocol):
    """A module with a kernel: `triton_kernel` or `cpu_kernel`."""

    def bound(self, buffers: Buffers) -> BoundKernel:
        """All of it for buffers that stay where they are."""
        ...
