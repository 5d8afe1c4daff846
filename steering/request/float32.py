"""The precision in which every edit is computed."""

from __future__ import annotations

import struct


def float32(value: float) -> float:
    """``value`` rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
