"""Groups a pass's tokens by the SAEs that take turns on the device, so that each is copied once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sae.arrays import IntArray
from steering.worker.residency import Residency


def by_turns(
    token_np: IntArray,
    slot_of_token: IntArray,
    full: Mapping[int, frozenset[int]],
    residency: Residency,
) -> list[IntArray]:
    """The tokens in groups, by which of the SAEs that take turns encode them.

    The group of what is on the device already comes first. A slot's tokens stay together and in
    their order, since a condition may look at earlier ones.

    Args:
        token_np: ``[n]`` indices in the batch, ascending.
        slot_of_token: ``[n]`` the slot of each.
        full: slot to the SAEs that encode its tokens in full; every slot of the tokens is in it.
        residency: which SAEs take turns, and whose turn it is.
    """
    turns = {slot: tuple(sorted(saes & residency.taking_turns)) for slot, saes in full.items()}
    groups = sorted({saes for saes in turns.values() if saes})
    if len(groups) < 2:
        return [token_np] if len(token_np) else []
    groups.sort(key=lambda saes: not residency.are_near(saes))
    # Tokens that none of these SAEs encodes go with the first group.
    rank_of_slot = {slot: groups.index(saes) if saes else 0 for slot, saes in turns.items()}
    rank_of_token = np.array([rank_of_slot[slot] for slot in slot_of_token.tolist()])
    return [token_np[rank_of_token == rank] for rank in range(len(groups))]
