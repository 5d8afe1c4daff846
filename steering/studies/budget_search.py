"""The search for the strength at which an edit costs what it may: few tries, no gradients.

A try is a pass of all texts through the model, so what counts is their number. Multiplier and cost
are compared as logarithms: where an edit is weak its cost goes as a power of its strength (KL as
the square), so that the curve is nearly a line there.
"""

from __future__ import annotations

import math
from bisect import insort
from itertools import pairwise
from typing import Final

#: A cost meets a budget of which it is at least this share and at most all.
LEAST_SHARE: Final = 0.9
#: Multipliers that are tried.
LOWEST, HIGHEST = 1 / 64, 64.0
#: Tries of one search; a search that finds nothing makes all of them.
MAX_TRIES: Final = 12

#: Where in the window a try aims: its middle, as logarithms go.
_AIM: Final = math.sqrt(LEAST_SHARE)
#: Costs below this share of the budget, negative ones among them, say only that they are low.
_LEAST_KNOWN: Final = 2.0**-16
#: Octaves that one try may go beyond those before it.
_MOST_OCTAVES: Final = 6.0
#: Powers of the strength as which a cost is taken to grow beyond what was tried.
_LEAST_POWER, _MOST_POWER = 0.5, 4.0
#: Multipliers nearer to each other than this, in octaves, have no other between them: a curve that
#: still leaps over the window there has a jump.
_JUMP: Final = 2.0**-10
#: Without a crossing, gaps wider than this many octaves are looked into.
_WIDEST_GAP: Final = 2.0


class BudgetSearch:
    """Look for the largest multiplier whose cost is within a budget.

    Costs on both sides of the budget at two multipliers bracket a third, if the curve has no jump.
    Of several brackets that of the largest multipliers is followed, since curves may fall again.

    Args:
        budget: above 0; met by costs in [0.9 budget, budget].
        power: of the multiplier, as which small costs grow: 2 for KL.
        lowest: multiplier to try at least.
        highest: multiplier to try at most.
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
        #: Of the brackets looked into, and how many of them were no half of the one before.
        self._widths: list[float] = []
        self._slow = 0

    @property
    def found(self) -> float | None:
        """The largest multiplier so far that meets the budget."""
        return next((m for _, _, m, cost in reversed(self._tried) if self._meets(cost)), None)

    def put(self, multiplier: float, cost: float) -> None:
        """What a multiplier costs; NaN counts as too much."""
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
        x = self._within(*bracket) if bracket is not None else self._beyond()
        return None if x is None else self._multiplier(x)

    def _meets(self, cost: float) -> bool:
        return LEAST_SHARE * self.budget <= cost <= self.budget

    def _multiplier(self, x: float) -> float:
        """2^x within the limits, in four digits unless these were tried: people read it."""
        exact = 2.0 ** min(max(x, self._low), self._high)
        short = float(f"{exact:.4g}")
        inside = 2.0**self._low <= short <= 2.0**self._high
        return short if inside and all(short != m for _, _, m, _ in self._tried) else exact

    def _bracket(self) -> tuple[int, int] | None:
        """Neighbours among what was tried with the budget between them."""
        for i in reversed(range(len(self._tried) - 1)):
            (x0, y0, *_), (x1, y1, *_) = self._tried[i], self._tried[i + 1]
            if (y0 < 0) != (y1 < 0) and x1 - x0 > _JUMP:
                return i, i + 1
        return None

    def _within(self, left: int, right: int) -> float:
        """Between two neighbours: where a curve through what was tried near them meets the aim."""
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

        It is that of the parabola through a third of what was tried, or, if there is none, of one
        that begins as a small cost grows.
        """
        (x0, y0, *_), (x1, y1, *_) = self._tried[left], self._tried[right]
        width = x1 - x0
        outside = [i for i in (left - 1, right + 1) if 0 <= i < len(self._tried)]
        if not outside:
            return self._power * width - (y1 - y0) if y0 < 0 else 0.0
        x, y, *_ = self._tried[min(outside, key=lambda i: abs(self._tried[i][1]))]
        t = (x - x0) / width
        return (y - y0 - (y1 - y0) * t) / (t * (1 - t))

    def _beyond(self) -> float | None:
        """Outside of what was tried if the budget may lie there, else in its widest gap."""
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
        """As which power of the multiplier the cost goes beyond what was tried, above or below."""
        if len(self._tried) < 2:
            return self._power
        (x0, y0, *_), (x1, y1, *_) = self._tried[-2:] if rising else self._tried[:2]
        # Large costs level off, so that below them a curve is steeper than it was seen to be.
        least = _LEAST_POWER if rising else self._power / 2
        return min(max((y1 - y0) / (x1 - x0), least), _MOST_POWER)


def _root(y0: float, y1: float, bend: float) -> float:
    """Where y0 + (y1 - y0) t + bend t (1 - t) is 0, for t in [0, 1] and y0, y1 of two signs."""
    if abs(bend) < 1e-9 * abs(y1 - y0):
        return y0 / (y0 - y1)
    # -bend t^2 + (y1 - y0 + bend) t + y0 has one root between, since the signs differ.
    b = y1 - y0 + bend
    root = math.sqrt(b * b + 4 * bend * y0)
    q = (b + math.copysign(root, b)) / 2
    candidates = [q / bend, -y0 / q if q else 0.5]
    return min(candidates, key=lambda t: abs(t - 0.5))
