"""Contrast and attribution, against sums over pairs and by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from sae import discovery
from sae.arrays import FloatArray
from sae.discovery import attribution, auroc, contrast, pooled, strongest


def pairs(first: FloatArray, second: FloatArray) -> float:
    """The definition: over every pair, 1 where the first is larger and a half for a tie."""
    larger = (first[:, None] > second[None]).sum() + 0.5 * (first[:, None] == second[None]).sum()
    return float(larger / (len(first) * len(second)))


@pytest.fixture(params=[2**22, 10], ids=["at once", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(discovery, "_RANKED_AT_ONCE", request.param)
    yield


def test_auroc_is_that_of_every_pair(parts: None) -> None:
    rng = np.random.default_rng(0)
    # Few values, so that many tie; activations are mostly 0.
    first = rng.integers(0, 4, (7, 30)).astype(np.float32)
    second = rng.integers(0, 3, (5, 30)).astype(np.float32)
    expected = [pairs(first[:, i], second[:, i]) for i in range(30)]
    np.testing.assert_allclose(auroc(first, second), expected, rtol=0, atol=1e-12)


def test_auroc_of_sets_that_are_apart_or_alike() -> None:
    apart = np.array([[3.0, 0.0], [4.0, 0.0]], np.float32)
    other = np.array([[1.0, 0.0], [2.0, 0.0]], np.float32)
    assert auroc(apart, other).tolist() == [1.0, 0.5]
    assert auroc(other, apart).tolist() == [0.0, 0.5]


def test_contrast_by_hand() -> None:
    first = np.array([[1.0, 2.0], [3.0, 2.0]], np.float32)
    second = np.array([[0.0, 2.0], [2.0, 2.0]], np.float32)
    found = contrast(first, second)
    assert found.mean_first.tolist() == [2.0, 2.0]
    assert found.mean_second.tolist() == [1.0, 2.0]
    assert found.difference.tolist() == [1.0, 0.0]
    # s is the square root of 2 on both sides.
    assert found.d[0] == pytest.approx(1 / np.sqrt(2))
    assert np.isnan(found.d[1])
    assert found.auroc.tolist() == [0.75, 0.5]


def test_two_constants_that_differ_are_infinitely_far_apart() -> None:
    ones = np.ones((2, 1), np.float32)
    assert contrast(ones, 0 * ones).d.tolist() == [np.inf]


def test_spread_of_a_single_text_is_not_known() -> None:
    assert np.isnan(contrast(np.ones((1, 3), np.float32), np.zeros((5, 3), np.float32)).d).all()


def test_text_is_pooled_over_its_tokens() -> None:
    f = np.array([[1.0, 5.0], [2.0, 0.0], [3.0, 1.0]], np.float32)
    assert pooled(f, "mean").tolist() == [2.0, 2.0]
    assert pooled(f, "max").tolist() == [3.0, 5.0]
    assert pooled(f, "last").tolist() == [3.0, 1.0]
    with pytest.raises(ValueError, match="'median' is not one of mean, max, last"):
        pooled(f, "median")


def test_ties_go_to_the_larger_difference_and_then_to_the_lower_index() -> None:
    score = np.array([0.5, 0.9, 0.9, 0.9, np.nan, 0.9])
    difference = np.array([9.0, 1.0, -2.0, 2.0, 9.0, 1.0])
    assert strongest(score, difference, 4).tolist() == [2, 3, 1, 5]
    assert strongest(score, difference, 10).tolist() == [2, 3, 1, 5, 0]


def test_attribution_is_exact_for_a_score_that_is_linear_in_the_stream() -> None:
    rng = np.random.default_rng(1)
    W_dec = rng.standard_normal((6, 4), dtype=np.float32)
    f = np.maximum(rng.standard_normal((3, 6), dtype=np.float32), np.float32(0))
    gradient = rng.standard_normal((3, 4), dtype=np.float32)

    def score(activations: FloatArray) -> float:
        return float((activations @ W_dec * gradient).sum())

    expected: list[float] = []
    for latent in range(6):
        ablated = f.copy()
        ablated[:, latent] = 0
        expected.append(score(f) - score(ablated))
    np.testing.assert_allclose(attribution(f, gradient, W_dec).tolist(), expected, atol=1e-5)
