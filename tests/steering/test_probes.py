"""What a pass may observe of an SAE: strongest features, totals over a text, fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae.self_check import Observed
from steering.report import features_read
from steering.worker.probes import Fit, TopFeatures, Totals, strongest
from steering.worker.rows_by_position import RowsByPosition

# --- strongest ------------------------------------------------------------------------------------


@given(
    rows=st.lists(
        # Few different values: ties, negative ones, zeros, and what is not a number.
        st.lists(st.sampled_from([0.0, -1.0, 0.5, 2.0, 2.5, 1e30, torch.inf, torch.nan]),
                 min_size=6, max_size=6),
        min_size=1,
        max_size=4,
    ),
    k=st.integers(1, 8),
)  # fmt: skip
def test_strongest_features_are_the_largest_with_ties_by_lower_index(
    rows: list[list[float]], k: int
) -> None:
    latents, values = strongest(torch.tensor(rows), k)
    for f, found, its_values in zip(rows, latents.tolist(), values.tolist(), strict=True):
        best = sorted((-v, i) for i, v in enumerate(f) if v > 0)[:k]
        wanted = [(i, float(torch.tensor(-v))) for v, i in best]
        assert [pair for pair in zip(found, its_values, strict=True) if pair[1] > 0] == wanted


def put(top: TopFeatures, positions: list[int], covered: list[bool], latent: int) -> None:
    n = len(positions)
    top.put(
        np.array(positions),
        np.array(covered),
        np.full((n, 2), latent, dtype=np.int32),
        np.full((n, 2), 1.0, dtype=np.float32),
    )


def test_a_read_of_a_rejected_token_is_forgotten_when_its_place_is_computed_anew() -> None:
    top = TopFeatures(1)
    put(top, [0, 1], [True, True], 5)
    put(top, [1, 2], [False, False], 6)
    read = top.summary(9)
    assert read is not None
    assert list(features_read(read)) == [(0, [[5, 1.0]])]
    nothing = top.summary(0)
    assert nothing is not None
    assert not list(features_read(nothing))


def test_what_streams_is_handed_out_once_in_the_order_in_which_it_came() -> None:
    top = TopFeatures(2, stream=True)
    assert top.unsent() is None
    put(top, [0, 1], [True, True], 5)
    put(top, [1], [False], 6)
    rows = top.unsent()
    assert rows is not None
    positions, covered, latents, _ = rows
    assert positions.tolist() == [0, 1, 1]
    assert covered.tolist() == [True, True, False]
    assert latents[:, 0].tolist() == [5, 5, 6]
    assert top.unsent() is None


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=200))
def test_the_last_row_of_each_position_is_kept_however_many_parts_there_are(
    passes: list[list[int]],
) -> None:
    rows = RowsByPosition()
    expected: dict[int, int] = {}
    for number, positions in enumerate(passes):
        values = [100 * number + i for i in range(len(positions))]
        rows.put(np.array(positions), np.array(values))
        expected.update(zip(positions, values, strict=True))
    positions_np, (values_np,) = rows.latest()
    assert dict(zip(positions_np.tolist(), values_np.tolist(), strict=True)) == expected
    assert positions_np.tolist() == sorted(expected)


# --- totals ---------------------------------------------------------------------------------------


def totals(aggregate: str, top_k: int, *parts: list[list[float]]) -> list[list[float]]:
    """Of tokens that follow each other."""
    made = Totals(aggregate, top_k, len(parts[0][0]), "cpu")
    start = 0
    for part in parts:
        positions = torch.arange(start, start + len(part))
        made.observe(positions, torch.ones(len(part), dtype=torch.bool), torch.tensor(part))
        start += len(part)
    return made.summary(99)


def test_totals_rank_best_first_and_break_ties_by_lower_index() -> None:
    f = [[1.0, 0.0, 4.0, 1.0], [1.0, 0.0, 0.0, 3.0]]
    assert totals("max", 2, f) == [[2, 4.0], [3, 3.0]]
    assert totals("mean", 4, f) == [[2, 2.0], [3, 2.0], [0, 1.0]]
    assert totals("frequency", 2, f) == [[0, 1.0], [3, 1.0]]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_totals_leave_out_activations_that_are_not_finite(bad: float) -> None:
    parts = [[bad, 1.0, 0.0], [2.0, 3.0, bad]], [[2.0, 0.0, 0.0], [bad, 0.0, 0.0]]
    assert totals("max", 3, *parts) == [[1, 3.0], [0, 2.0]]
    assert totals("mean", 3, *parts) == [[0, 1.0], [1, 1.0]]
    assert totals("frequency", 3, *parts) == [[0, 0.5], [1, 0.5]]


def test_a_position_enters_the_totals_once_and_an_uncovered_one_never() -> None:
    made = Totals("mean", 1, 1, "cpu")
    yes = torch.tensor([True, True])
    made.observe(torch.tensor([0, 1]), yes, torch.tensor([[1.0], [3.0]]))
    made.observe(torch.tensor([1, 2]), yes, torch.tensor([[50.0], [5.0]]))
    made.observe(torch.tensor([3, 4]), ~yes, torch.tensor([[70.0], [70.0]]))
    assert made.summary(99) == [[0, 3.0]]


# --- fit ------------------------------------------------------------------------------------------


def test_fit_measures_the_covered_tokens() -> None:
    x, x_hat = torch.randn(6, 3), torch.randn(6, 3)
    l0 = torch.tensor([1, 1, 1, 2, 2, 2])
    covered = torch.tensor([True, True, False, True, True, True])
    fit, observed = Fit(), Observed()
    fit.observe(torch.arange(6), covered, x, x_hat, l0)
    kept = covered.numpy()
    observed.put(
        np.arange(6)[kept], x.numpy()[kept], x_hat.numpy()[kept], np.array([1, 1, 2, 2, 2])
    )
    wanted = observed.measured(6)
    assert fit.summary(6) == vars(wanted)
    assert wanted.l0 == 8 / 5


def test_the_strongest_are_ranked_alike_with_ties_and_without() -> None:
    f = torch.randn(200, 50, generator=torch.Generator().manual_seed(3))
    f[50:] = (2 * f[50:]).round().relu()  # few values, so that most tokens have ties
    f[100, 7] = f[0, 3] = torch.nan
    f[101, 9] = torch.inf
    f[102] = 0
    for k in (1, 5, 49, 50, 60):
        latents, values = strongest(f, k)
        assert latents.dtype == torch.int32
        best = (
            f.nan_to_num(nan=0.0, posinf=torch.inf).clamp_min(0).sort(descending=True, stable=True)
        )
        want = best.values[:, :k]
        assert torch.equal(values, want)
        assert torch.equal(latents.long(), torch.where(want > 0, best.indices[:, :k], 0))
