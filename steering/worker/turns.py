"""A pass's tokens, apart by SAEs that take turns on the device: each is copied once a pass."""

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
    """The tokens, apart by which of the SAEs that take turns encode them.

    What is on the device already comes first. A slot's tokens stay together and in their order, for
    conditions on earlier ones.

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
    # Those that none of them encodes go with the first.
    rank_of_slot = {slot: groups.index(saes) if saes else 0 for slot, saes in turns.items()}
    rank_of_token = np.array([rank_of_slot[slot] for slot in slot_of_token.tolist()])
    return [token_np[rank_of_token == rank] for rank in range(len(groups))]
