"""Tokens to slots, in the input batch's order."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from steering.worker.ops.layout import NO_SLOT
from steering.worker.step import Step


def new_step(size: int = 64) -> Step:
    return Step(
        size, torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int32), "cpu"
    )


batches = st.lists(st.tuples(st.integers(-1, 5), st.integers(1, 6)), min_size=1, max_size=8)


#: Few different ones, so that a batch often comes again: at once, or after another.
passes = st.lists(batches, min_size=1, max_size=3).flatmap(
    lambda few: st.lists(st.sampled_from(few), min_size=1, max_size=6)
)


@given(passes)
def test_every_token_has_its_requests_slot_and_padding_has_none(
    passes: list[list[tuple[int, int]]],
) -> None:
    step = new_step()
    for batch in passes:
        lengths = [length for _, length in batch]
        step.begin([slot for slot, _ in batch], np.cumsum([0, *lengths]))
        expected = [slot for slot, length in batch for _ in range(length)]
        if all(slot == NO_SLOT for slot in expected):
            assert not step.active
        assert step.token_slot.tolist() == expected + [NO_SLOT] * (64 - len(expected))
        step.end()
        assert not step.active


def test_a_batch_that_stays_the_same_is_not_laid_out_again() -> None:
    step = new_step()
    step.begin([3, 4], np.array([0, 1, 2]))
    laid_out = step.token_slot_np
    step.end()
    step.begin([3, 4], np.array([0, 1, 2]))
    assert step.active
    assert step.token_slot_np is laid_out
    step.begin([4, 3], np.array([0, 1, 2]))
    assert step.token_slot[:2].tolist() == [4, 3]


def test_a_pass_without_steered_requests_leaves_nothing_of_the_last_one() -> None:
    step = new_step()
    step.begin([3], np.array([0, 10]))
    step.end()
    step.begin((), np.array([0]))
    assert not step.active
    assert (step.token_slot == NO_SLOT).all()
