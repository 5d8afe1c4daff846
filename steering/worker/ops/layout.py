"""Columns, codes and markers that every version of the edit shares, each named once."""

from __future__ import annotations

from typing import Final

from sae.normalization import LAYER_NORM_EPS
from steering.request.limits import MAX_GATES, MAX_INTERVENTIONS
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SINKS,
    COVERS_SPECIAL,
    GATE_BELOW,
    OP_ADD,
    OP_CAP,
    OP_CLAMP,
    OP_FLOOR,
    OP_SCALE,
    SCOPE_PROMPT,
    SCOPE_SO_FAR,
    SCOPE_STOP,
    SCOPE_TOKEN,
)

__all__ = [
    "COVERS_GENERATION",
    "COVERS_PROMPT",
    "COVERS_SINKS",
    "COVERS_SPECIAL",
    "GATE_BELOW",
    "LAYER_NORM_EPS",
    "MAX_GATES",
    "MAX_INTERVENTIONS",
    "OP_ADD",
    "OP_CAP",
    "OP_CLAMP",
    "OP_FLOOR",
    "OP_SCALE",
    "SCOPE_PROMPT",
    "SCOPE_SO_FAR",
    "SCOPE_STOP",
    "SCOPE_TOKEN",
]

NO_SLOT: Final = -1

# Columns of `EditTable.ints`. COLUMN: where the edit's activation stands in the pass's buffer.
# GATES: bit i for gate i of the request, and ANY_GATE. FLAGS: see below.
E_ROW, E_OP, E_COVERAGE, E_START, E_END, E_COLUMN, E_GATES, E_FLAGS = range(8)
NUM_EDIT_INTS: Final = 8
#: In GATES: one open gate is enough; else all that are named must be open.
ANY_GATE: Final = 1 << MAX_GATES
GATE_BITS: Final = ANY_GATE - 1
#: In FLAGS: the row is solved so that the pre-activation, read again, is the wanted one.
REREAD: Final = 1
#: In FLAGS: read at another hook point, which left the change in `Buffers.carried`.
CARRIED: Final = 2

# Columns of `GateTable.ints`. INDEX: which of the request's gates.
G_ROW, G_INDEX, G_SCOPE = range(3)
NUM_GATE_INTS: Final = 4

# A gate as `GateState.kind` holds it: its scope times KIND_SCOPE, plus its sense.
KIND_SENSE: Final = 1
KIND_SCOPE: Final = 2
#: `GateState.events`: gate i had its event: bit i; it could have had and had not: bit i + QUIET.
QUIET: Final = MAX_GATES
#: `GateState.first_held` of a gate without an event.
NEVER: Final = 2**31 - 1

# Columns of `RowPool.params`. With z = W_enc @ x_normed: p = gain * z + bias, and the latent
# fires where p > threshold and z + gate_bias > 0.
P_BIAS, P_GAIN, P_THRESHOLD, P_GATE_BIAS, P_DECODER_SCALE, P_ENC_SUM, P_SINK, P_NORM = range(8)
NUM_PARAMS: Final = 8

# Values of the column P_NORM: how the SAE normalizes its input.
NORM_NONE, NORM_LAYER, NORM_CONSTANT = range(3)

# What stands before the reading of an activation: the stream, or what a norm without its gain
# makes of it.
INPUT_PLAIN, INPUT_RMS, INPUT_LAYER = range(3)

#: Columns of the pass's buffer of activations: a request's edits, and its gates after them.
MAX_ENTRIES: Final = MAX_INTERVENTIONS + MAX_GATES
FIRST_GATE_COLUMN: Final = MAX_INTERVENTIONS

# In that buffer, in place of an activation. The last is the lowest finite float32: an activation
# may be infinite where the stream, in float16, is.
NOT_COVERED, SKIPPED_SINK, HELD_BACK = float("nan"), float("-inf"), -(2 - 2**-23) * 2.0**127

#: In the buffer of shares: no edit was made here. A share that `max_share` limited is negative.
NOT_EDITED: Final = float("-inf")

#: In float16, which ends at 65,504, an edit makes no element of the stream, nor of the hidden
#: states that carry it, larger than this, or than it was: half the range is left to later layers.
FLOAT16_LIMIT: Final = 32768.0

#: With REREAD, a feature that is to be silent is set to at most so much of its threshold.
SILENT: Final = 0.9
