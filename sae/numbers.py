"""Numbers out of JSON, in which anything may stand in their place."""

from __future__ import annotations

import math


def finite(value: object) -> float | None:
    """The value as a float; None if it is no number, is true or false, or is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def positive(value: object) -> float | None:
    """The value as a float; None if it is no finite number above 0."""
    number = finite(value)
    return number if number is not None and number > 0 else None
