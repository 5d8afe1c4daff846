"""The search for the strength at which an edit costs what a budget allows, in few tries.

A try is a pass of all texts through the model, so what counts is their number. Multiplier and cost
are compared as logarithms: where an edit is weak its cost goes as a power of its strength (KL as
the square), so that the curve is nearly a line there.
"""

from __future__ import annotations

import math
from bisect import insort
from itertools import pairwise
from typing import Final

#: A cost meets a budget if it is at least this share of the budget, and not above it.
LEAST_SHARE: Final = 0.9
#: The least and the largest multiplier that are tried.
LOWEST, HIGHEST = 1 / 64, 64.0
#: Most tries of one search.
MAX_TRIES: Final = 14

#: The share of the budget at which a try aims: the middle of the window on a logarithmic scale.
_AIM: Final = math.sqrt(LEAST_SHARE)
#: Costs below this share of the aim, negative ones included, are all taken as this share.
_LEAST_KNOWN: Final = 2.0**-16
#: How many octaves one try may go beyond those before it.
_MOST_OCTAVES: Final = 6.0
#: Beyond what was tried a cost is taken to grow as a power of the strength within these limits.
_LEAST_POWER, _MOST_POWER = 0.5, 4.0
#: Between multipliers nearer to each other than this, in octaves, nothing is tried: a curve that
#: crosses the whole window there has a jump.
_JUMP: Final = 2.0**-10
#: Around a turn of the curve on one side of the budget, gaps wider than these octaves are looked
#: into.
_NARROWEST: Final = 2.0**-3
#: A difference of costs, in octaves, that is not taken for rounding.
_SURE: Final = 0.1
#: If the curve crosses the budget nowhere, gaps wider than this many octaves are looked into.
_WIDEST_GAP: Final = 2.0


class BudgetSearch:
    """A search for the largest multiplier whose cost meets a budget.

    Two multipliers with costs on both sides of the budget bracket one that meets it, unless the
    curve has a jump. If there are several brackets, the one of the largest multipliers is followed,
    since curves may fall again. Without a bracket, a turn of the curve towards the budget is looked
    into: a clamp of a feature that always fires costs least near the feature's own activation.

    Args:
        budget: above 0; a cost in [0.9 budget, budget] meets it.
        power: small costs grow as this power of the multiplier: 2 for KL.
        lowest: the least multiplier to try.
        highest: the largest multiplier to try.
    """

    def __init__(
        self,
        budget: float,
        power: float = 2.0,
        lowest: float = LOWEST,
        highest: float = HIGHEST,
    ) -> None:
        assert budget > 0 and 0 < lowest <= highest
        self.budget = budget
        self._power = power
        self._low, self._high = math.log2(lowest), math.log2(highest)
        #: (log2 of the multiplier, log2 of cost / aim, multiplier, cost), ascending
        self._tried: list[tuple[float, float, float, float]] = []
        #: Widths of the brackets looked into, in octaves.
        self._widths: list[float] = []
        #: How many of them were wider than half of the one before, since the last bisection.
        self._slow = 0

    @property
    def found(self) -> float | None:
        """The largest multiplier so far that meets the budget; None if none does."""
        return next((m for _, _, m, cost in reversed(self._tried) if self._meets(cost)), None)

    def put(self, multiplier: float, cost: float) -> None:
        """Take note of what a multiplier costs; NaN counts as too much."""
        share = cost / (self.budget * _AIM)
        y = (
            math.log2(max(share, _LEAST_KNOWN))
            if math.isfinite(share)
            else -math.log2(_LEAST_KNOWN)
        )
        insort(self._tried, (math.log2(multiplier), y, multiplier, cost))

    def next(self) -> float | None:
        """The multiplier to try next; None if the search is over."""
        if self.found is not None or len(self._tried) >= MAX_TRIES:
            return None
        if not self._tried:
            return self._multiplier(0.0)
        bracket = self._bracket()
        if bracket is not None:
            x: float | None = self._within(*bracket)
        else:
            x = self._turn()
            x = self._beyond() if x is None else x
        return None if x is None else self._multiplier(x)

    def _meets(self, cost: float) -> bool:
        return LEAST_SHARE * self.budget <= cost <= self.budget

    def _multiplier(self, x: float) -> float:
        """2^x within the limits, rounded to four digits for readers unless that was tried."""
        exact = 2.0 ** min(max(x, self._low), self._high)
        short = float(f"{exact:.4g}")
        inside = 2.0**self._low <= short <= 2.0**self._high
        return short if inside and all(short != m for _, _, m, _ in self._tried) else exact

    def _bracket(self) -> tuple[int, int] | None:
        """The indices of neighbouring tries whose costs lie on both sides of the aim."""
        for i in reversed(range(len(self._tried) - 1)):
            (x0, y0, *_), (x1, y1, *_) = self._tried[i], self._tried[i + 1]
            if (y0 < 0) != (y1 < 0) and x1 - x0 > _JUMP:
                return i, i + 1
        return None

    def _within(self, left: int, right: int) -> float:
        """Where a curve through the tries near two neighbours meets the aim between them."""
        (x0, y0, *_), (x1, y1, *_) = self._tried[left], self._tried[right]
        width = x1 - x0
        if self._widths and width > self._widths[-1] / 2:
            self._slow += 1
        self._widths.append(width)
        if self._slow > 1:
            self._slow = 0
            return (x0 + x1) / 2
        x = x0 + width * _root(y0, y1, self._bend(left, right))
        return min(max(x, x0 + width / 32), x1 - width / 32)

    def _bend(self, left: int, right: int) -> float:
        """How far the curve between two neighbours lies above their line in its middle, times 4.

        The curve is the parabola through a third try. If there is none, it is the parabola that
        begins at the left neighbour as small costs grow, or the line if that costs too much.
        """
        (x0, y0, *_), (x1, y1, *_) = self._tried[left], self._tried[right]
        width = x1 - x0
        outside = [i for i in (left - 1, right + 1) if 0 <= i < len(self._tried)]
        if not outside:
            return self._power * width - (y1 - y0) if y0 < 0 else 0.0
        x, y, *_ = self._tried[min(outside, key=lambda i: abs(self._tried[i][1]))]
        t = (x - x0) / width
        return (y - y0 - (y1 - y0) * t) / (t * (1 - t))

    def _turn(self) -> float | None:
        """Near the try nearest to the budget, if all are on one side of it and the curve turns.

        None if it is not seen to turn, or if the tries around the turn are near to each other.
        """
        nearest = min(range(len(self._tried)), key=lambda i: abs(self._tried[i][1]))
        if len({y >= 0 for _, y, *_ in self._tried}) > 1 or len(self._tried) < 2:
            return None
        if nearest in (0, len(self._tried) - 1):
            return self._outside(nearest)
        (x0, y0, *_), (x1, y1, *_), (x2, y2, *_) = self._tried[nearest - 1 : nearest + 2]
        left, right = x1 - x0, x2 - x1
        if max(left, right) <= _NARROWEST:
            return None
        slope, next_slope = (y1 - y0) / left, (y2 - y1) / right
        # Where the parabola through the three turns; its slope in the middle of x0 and x1 is known.
        bend = (next_slope - slope) / (x2 - x0)
        x = (x0 + x1) / 2 - slope / (2 * bend) if bend else x1
        if abs(x - x1) < max(left, right) / 8:
            x = x1 + right / 2 if right > left else x1 - left / 2
        return min(max(x, x0 + left / 8), x2 - right / 8)

    def _outside(self, nearest: int) -> float | None:
        """Beyond an end of the tries where costs come nearer to the budget against their rule."""
        (x, y, *_), beside = self._tried[nearest], self._tried[1 if nearest == 0 else nearest - 1]
        falls_to_the_right = y >= 0 and nearest > 0
        rises_to_the_left = y < 0 and nearest == 0
        if not (falls_to_the_right or rises_to_the_left) or abs(beside[1] - y) < _SURE:
            return None
        octaves = 2 * abs(x - beside[0])
        end = min(x + octaves, self._high) if falls_to_the_right else max(x - octaves, self._low)
        return end if abs(end - x) > _JUMP else None

    def _beyond(self) -> float | None:
        """A point outside of the tries if the budget may lie there, else in their widest gap."""
        all_low = all(y < 0 for _, y, *_ in self._tried)
        edge = self._tried[-1] if all_low else self._tried[0]
        x, y = edge[0], edge[1]
        room = self._high - x if all_low else x - self._low
        if room > _JUMP and (all_low or all(y >= 0 for _, y, *_ in self._tried)):
            octaves = min(abs(y) / self._slope(rising=all_low), _MOST_OCTAVES)
            return x + octaves if all_low else x - octaves
        ends = sorted({self._low, self._high, *(x for x, *_ in self._tried)})
        gaps = [(b - a, a, b) for a, b in pairwise(ends) if b - a > _WIDEST_GAP]
        if not gaps:
            return None
        _, a, b = max(gaps)
        return (a + b) / 2

    def _slope(self, *, rising: bool) -> float:
        """The power of the multiplier as which the cost goes on above or below the tries."""
        if len(self._tried) < 2:
            return self._power
        (x0, y0, *_), (x1, y1, *_) = self._tried[-2:] if rising else self._tried[:2]
        # Large costs level off, so that below them a curve is steeper than it was seen to be.
        least = _LEAST_POWER if rising else self._power / 2
        return min(max((y1 - y0) / (x1 - x0), least), _MOST_POWER)


def _root(y0: float, y1: float, bend: float) -> float:
    """The t in [0, 1] at which y0 + (y1 - y0) t + bend t (1 - t) is 0; y0 and y1 differ in sign."""
    if abs(bend) < 1e-9 * abs(y1 - y0):
        return y0 / (y0 - y1)
    # -bend t^2 + (y1 - y0 + bend) t + y0 has one root between, since the signs differ.
    b = y1 - y0 + bend
    root = math.sqrt(b * b + 4 * bend * y0)
    q = (b + math.copysign(root, b)) / 2
    candidates = [q / bend, -y0 / q if q else 0.5]
    return min(candidates, key=lambda t: abs(t - 0.5))
