"""Which rows of a pass are kept of a study's runs, and when they are forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steering.request.keep import Keep
from steering.worker.captures import Captures

D = 4


def stream(positions: Sequence[int], of: int = 0) -> torch.Tensor:
    """``[n, D]``: each row says whose it is and where it stands."""
    return torch.tensor([[float(of), float(position), 0, 0] for position in positions])


def one_pass(captures: Captures, *parts: tuple[str, int, int]) -> None:
    """A pass over ``(request, first position, one past the last)``; request "r3" is number 3."""
    starts = np.cumsum([0, *(stop - start for _, start, stop in parts)])
    captures.begin(
        [req_id for req_id, _, _ in parts], starts, lambda: {r: start for r, start, _ in parts}
    )
    rows = [stream(range(start, stop), int(req_id[1:])) for req_id, start, stop in parts]
    captures.put(torch.cat([*rows, torch.full((3, D), torch.nan)]))  # padding
    captures.end()


def kept(captures: Captures, key: str) -> list[list[float]] | None:
    rows = captures.rows(key)
    return None if rows is None else rows[:, :2].tolist()


def test_only_rows_that_were_asked_for_are_kept() -> None:
    captures = Captures()
    captures.open("r1", Keep("a", 3, 6))
    captures.open("r3", Keep("b", 0, 2))
    one_pass(captures, ("r0", 0, 4), ("r1", 0, 8), ("r2", 5, 6), ("r3", 0, 2))
    assert kept(captures, "a") == [[1, 3], [1, 4], [1, 5]]
    assert kept(captures, "b") == [[3, 0], [3, 1]]
    assert captures.rows("nobody") is None


def test_chunks_are_put_together_and_no_part_is_told_before() -> None:
    captures = Captures()
    captures.open("r1", Keep("a", 2, 9))
    one_pass(captures, ("r1", 0, 2))
    assert kept(captures, "a") is None
    one_pass(captures, ("r2", 0, 5), ("r1", 2, 5))
    assert kept(captures, "a") is None
    one_pass(captures, ("r1", 5, 8), ("r2", 5, 6))
    one_pass(captures, ("r1", 8, 12))
    assert kept(captures, "a") == [[1, position] for position in range(2, 9)]


def test_position_that_is_computed_again_replaces_itself() -> None:
    captures = Captures()
    captures.open("r1", Keep("a", 0, 4))
    one_pass(captures, ("r1", 0, 3))
    captures.close("r1")
    one_pass(captures, ("r1", 3, 4))  # not in the batch for us
    assert kept(captures, "a") is None
    captures.open("r1", Keep("a", 0, 4))
    captures.begin(["r1"], np.array([0, 4]), lambda: {"r1": 0})
    captures.put(stream(range(4), of=7))
    captures.end()
    assert kept(captures, "a") == [[7, position] for position in range(4)]


def test_prompt_that_begins_behind_a_cached_block_is_never_whole() -> None:
    captures = Captures()
    captures.open("r1", Keep("a", 0, 4))
    one_pass(captures, ("r1", 2, 4))
    assert kept(captures, "a") is None


def test_what_is_forgotten_takes_nothing_any_more() -> None:
    captures = Captures()
    captures.open("r1", Keep("a", 0, 4))
    captures.open("r2", Keep("b", 0, 2))
    one_pass(captures, ("r1", 0, 2), ("r2", 0, 2))
    assert len(captures) == 2
    captures.forget(["a", "never there"])
    assert len(captures) == 1
    one_pass(captures, ("r1", 2, 4))
    assert len(captures) == 1
    assert kept(captures, "a") is None
    assert kept(captures, "b") is not None
    captures.forget(["b"])
    assert len(captures) == 0


def test_positions_are_not_asked_for_where_nothing_is_kept() -> None:
    def asked() -> dict[str, int]:
        raise AssertionError

    captures = Captures()
    captures.begin(["r1"], np.array([0, 4]), asked)
    captures.put(stream(range(4)))


def test_keep_survives_its_way_to_the_worker() -> None:
    keep = Keep("a", 3, 9)
    assert Keep.from_wire(keep.to_wire()) == keep
