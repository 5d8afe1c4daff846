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

# Columns of `EditTable.ints`. COLUMN: the edit's index in its request, and so its column in
# `Buffers.f`. GATES: bit i for gate i of the request, and ANY_GATE. FLAGS: see below.
E_ROW, E_OP, E_COVERAGE, E_START, E_END, E_COLUMN, E_GATES, E_FLAGS = range(8)
NUM_EDIT_INTS: Final = 8
#: In GATES: one open gate is enough; without it all gates that are named must be open.
ANY_GATE: Final = 1 << MAX_GATES
GATE_BITS: Final = ANY_GATE - 1
#: In FLAGS: the row is solved so that the SAE, run again on the edited stream, reads the wanted
#: pre-activation (``match: "reread"``).
REREAD: Final = 1
#: In FLAGS: the edit is read at another hook point, which leaves its change in `Buffers.carried`.
CARRIED: Final = 2

# Columns of `GateTable.ints`. INDEX: the gate's index in its request.
G_ROW, G_INDEX, G_SCOPE = range(3)
NUM_GATE_INTS: Final = 4

# A gate as `GateState.kind` holds it: its scope times KIND_SCOPE, plus its sense.
KIND_SENSE: Final = 1
KIND_SCOPE: Final = 2
#: In `GateState.events` bit i says that gate i had its event at the token, and bit i + QUIET that
#: it had none, though it could have had one there.
QUIET: Final = MAX_GATES
#: The value in `GateState.first_held` of a gate without an event.
NEVER: Final = 2**31 - 1

# Columns of `RowPool.params`. With z = W_enc @ x_normed: p = gain * z + bias, and the latent
# fires where p > threshold and z + gate_bias > 0.
P_BIAS, P_GAIN, P_THRESHOLD, P_GATE_BIAS, P_DECODER_SCALE, P_ENC_SUM, P_SINK, P_NORM = range(8)
NUM_PARAMS: Final = 8

# Values of the column P_NORM: how the SAE normalizes its input.
NORM_NONE, NORM_LAYER, NORM_CONSTANT = range(3)

# What a hook point's SAEs read: the stream, or what a norm without its gain makes of it.
INPUT_PLAIN, INPUT_RMS, INPUT_LAYER = range(3)

#: Columns of the pass's buffer of activations: a request's edits, and its gates after them.
MAX_ENTRIES: Final = MAX_INTERVENTIONS + MAX_GATES
FIRST_GATE_COLUMN: Final = MAX_INTERVENTIONS

# Values in that buffer that stand in place of an activation. The last is the lowest finite float32,
# since an activation may be infinite if the stream, in float16, is.
NOT_COVERED, SKIPPED_SINK, HELD_BACK = float("nan"), float("-inf"), -(2 - 2**-23) * 2.0**127

#: In the buffer of shares: no edit was made. A share that `max_share` limited is negative there.
NOT_EDITED: Final = float("-inf")

#: In float16, which ends at 65,504, an edit makes no element of the stream, nor of the hidden
#: states that carry it, larger in size than this, unless it was so before. Half the range is left
#: to later layers.
FLOAT16_LIMIT: Final = 32768.0

#: With REREAD, the pre-activation of a feature that is to be silent is set to at most this share of
#: its threshold.
SILENT: Final = 0.9
