"""Comparing by turns: what else the machine does then falls on both sides alike.

Every measured run stands between two runs of a reference, and a ratio is taken against their mean.
Among the cases there should be a control, which is the reference again: the spread of its ratio
around one is the noise of all the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.bench.record import spread

Case = TypeVar("Case", bound=Hashable)


@dataclass(frozen=True)
class Run:
    """One batch from its submission to its last token.

    Attributes:
        seconds: of the whole.
        ttft: median seconds to a request's first token; 0 if it was not measured.
        itl: median over requests of the mean seconds between tokens; 0 if there was one token.
    """

    seconds: float
    ttft: float = 0.0
    itl: float = 0.0


@dataclass(frozen=True)
class Compared:
    """A run of a case and the runs of the reference on its two sides."""

    run: Run
    before: Run
    after: Run

    @property
    def throughput_ratio(self) -> float:
        """Of the case to the reference, for the same work."""
        return (self.before.seconds + self.after.seconds) / (2 * self.run.seconds)

    @property
    def ttft_ratio(self) -> float:
        """Time to the first token, of the case to the reference."""
        return 2 * self.run.ttft / (self.before.ttft + self.after.ttft)

    @property
    def itl_ratio(self) -> float:
        """Time between tokens, of the case to the reference."""
        return 2 * self.run.itl / (self.before.itl + self.after.itl)


def alternate(
    reference: Callable[[], Run],
    cases: Mapping[Case, Callable[[], Run]],
    rounds: int,
    *,
    warm: bool = True,
) -> dict[Case, list[Compared]]:
    """Run every case once a round, in random order, the reference before and after each.

    With ``warm``, the reference and every case are first run once for nothing.
    """
    for run in (reference, *cases.values()) if warm else ():
        run()
    found: dict[Case, list[Compared]] = {case: [] for case in cases}
    rng = random.Random(0)
    for _ in range(rounds):
        before = reference()
        for case in rng.sample(list(cases), len(cases)):
            measured = cases[case]()
            after = reference()
            found[case].append(Compared(measured, before, after))
            before = after
    return found


def ratios(compared: Sequence[Compared]) -> dict[str, Any]:
    """Columns of a table: spreads of what `Compared` compares, latencies where there are any."""
    columns = {"throughput_ratio": spread([one.throughput_ratio for one in compared])}
    if compared[0].run.ttft:
        columns["ttft_ratio"] = spread([one.ttft_ratio for one in compared])
    if compared[0].run.itl:
        columns["itl_ratio"] = spread([one.itl_ratio for one in compared])
    return columns


def paired(many: Sequence[Compared], one: Sequence[Compared]) -> dict[str, Any]:
    """Throughput of one case to that of another, round by round."""
    return spread([a.throughput_ratio / b.throughput_ratio for a, b in zip(many, one, strict=True)])
