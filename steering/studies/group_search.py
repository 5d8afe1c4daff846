"""A search for the few of many candidates that matter, by the effects of ever smaller groups.

Effects are assumed to add up, so that the effect of one half of a group tells that of the other.
Only an effect that was measured on a candidate alone is an answer.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

#: Groups are followed until none is left that could hold one of so many strongest candidates.
WANTED: Final = 4
#: A group is left alone if its effect is below this share of the `WANTED`-th strongest candidate's.
#: The share is below 1 because effects of opposite sign may cancel inside a group.
LEFT_BELOW: Final = 0.85
#: An effect that may be rounding, in nats.
NOTHING: Final = 1e-4
#: Groups at first: so many that strong effects of opposite sign seldom meet in one. Then halves.
FIRST_GROUPS: Final = 8

Members = tuple[int, ...]
#: Measures the effect of each group; None for a group whose members cannot be edited together.
Measure = Callable[[Sequence[Members]], Awaitable[Sequence[float | None]]]


@dataclass(order=True)
class _Group:
    """Candidates and their effect together; in a heap the group of the largest effect is first.

    Attributes:
        order: minus the size of the effect; minus infinity if it is not known.
        members: the candidates.
        effect: None if it is not known.
        measured: whether the group itself was measured; else its effect follows from others'.
    """

    order: float
    members: Members
    effect: float | None = field(compare=False)
    measured: bool = field(compare=False)

    @classmethod
    def of(cls, members: Members, effect: float | None, *, measured: bool) -> _Group:
        return cls(-math.inf if effect is None else -abs(effect), members, effect, measured)


async def strongest(
    weights: Mapping[int, float], measure: Measure, *, together: int
) -> dict[int, float]:
    """The effects of single candidates, with the strongest among them, by few measurements.

    No more than `most_measurements` are made.

    Args:
        weights: how much each candidate is expected to do, above 0. Groups have about equal weight,
            so a candidate of which much is expected shares its group with few.
        measure: measures the effects of groups.
        together: how many candidates one group may have at most.

    Returns:
        The effect of each candidate that was measured alone.
    """
    found: dict[int, float] = {}
    first = max(FIRST_GROUPS, math.ceil(len(weights) / together))
    members = _split(weights, weights, first, together)
    effects = await measure(members)
    left = most_measurements(len(weights)) - len(members)
    groups = [
        _Group.of(group, effect, measured=True)
        for group, effect in zip(members, effects, strict=True)
    ]
    heapq.heapify(groups)
    while groups and -groups[0].order > _least(found):
        group = heapq.heappop(groups)
        if len(group.members) == 1:
            (candidate,) = group.members
            if not group.measured:
                if left < 1:
                    break
                left -= 1
                (group.effect,) = await measure([group.members])
            if group.effect is not None:
                found[candidate] = group.effect
            continue
        halves = _split(group.members, weights, 2, together)
        asked = halves if group.effect is None else halves[:1]
        if left < len(asked):
            break
        left -= len(asked)
        effects = list(await measure(asked))
        known = [effect for effect in effects if effect is not None]
        if len(asked) == 1:
            rest = group.effect - known[0] if known and group.effect is not None else None
            effects.append(rest)
        for half, effect, measured in zip(halves, effects, (True, len(asked) > 1), strict=True):
            heapq.heappush(groups, _Group.of(half, effect, measured=measured))
    alone = (group for group in groups if len(group.members) == 1 and group.measured)
    found |= {group.members[0]: group.effect for group in alone if group.effect is not None}
    return found


def most_measurements(candidates: int) -> int:
    """How many measurements `strongest` makes at most; far fewer if few candidates matter."""
    return 2 * candidates


def _least(found: Mapping[int, float]) -> float:
    """The effect that a group must exceed to be looked into."""
    if len(found) < WANTED:
        return NOTHING
    return max(LEFT_BELOW * sorted(map(abs, found.values()))[-WANTED], NOTHING)


def _split(
    members: Collection[int], weights: Mapping[int, float], parts: int, together: int
) -> list[Members]:
    """``parts`` groups of about equal weight, none empty and none of more than ``together``."""
    groups: list[list[int]] = [[] for _ in range(min(parts, len(members)))]
    weight = [0.0] * len(groups)
    for candidate in sorted(members, key=lambda i: (-weights[i], i)):
        room = (i for i, group in enumerate(groups) if len(group) < together)
        lightest = min(room, key=lambda i: (weight[i], len(groups[i])))
        groups[lightest].append(candidate)
        weight[lightest] += weights[candidate]
    return [tuple(group) for group in groups]
