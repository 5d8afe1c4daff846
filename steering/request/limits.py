"""The words and the limits of the ``steering`` field."""

from __future__ import annotations

from typing import Final

OPS: Final = ("clamp", "ablate", "scale", "add", "floor", "cap")
UNITS: Final = ("raw", "max_act")
MAX_INTERVENTIONS: Final = 64
#: Distinct conditions of one request, those of ``stop_when`` among them.
MAX_GATES: Final = 8
MAX_TOP_K: Final = 64
DEFAULT_TOP_K: Final = 5
VALUE_LIMIT: Final = 1e6
#: End of a window that was left open; positions are int32 on the device.
POSITION_LIMIT: Final = 2**31 - 1
FLOAT32_MAX: Final = (2 - 2**-23) * 2.0**127
