"""The words and the limits of the ``steering`` field."""

from __future__ import annotations

from typing import Final, Literal, get_args

Op = Literal["clamp", "ablate", "scale", "add", "floor", "cap"]
Unit = Literal["raw", "max_act"]
Scope = Literal["token", "so_far", "prompt"]
Match = Literal["delta", "reread"]

OPS: Final[tuple[str, ...]] = get_args(Op)
UNITS: Final[tuple[str, ...]] = get_args(Unit)
MAX_INTERVENTIONS: Final = 64
#: Distinct conditions of one request, those of ``stop_when`` included.
MAX_GATES: Final = 8
#: Conditions in one list, equal ones included.
MAX_CONDITIONS: Final = 64
MAX_PROTECTED: Final = 64
MAX_TOP_K: Final = 64
DEFAULT_TOP_K: Final = 5
VALUE_LIMIT: Final = 1e6
#: The largest share of the stream's norm that ``max_share`` may state.
SHARE_LIMIT: Final = 10.0
#: The last position: positions are int32 on the device.
POSITION_LIMIT: Final = 2**31 - 1
#: End of a window that was left open: it has every position.
OPEN_END: Final = POSITION_LIMIT + 1
FLOAT32_MAX: Final = (2 - 2**-23) * 2.0**127
#: The smallest normal number of float32.
FLOAT32_TINY: Final = 2.0**-126
