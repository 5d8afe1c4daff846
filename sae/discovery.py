"""Which features tell one set of texts from another, and which ones a text's probability rests on.

Arithmetic on activations that were read elsewhere; nothing here runs a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sae.arrays import FloatArray, IntArray

Float64Array = npt.NDArray[np.float64]

POOLS: Final = ("mean", "max", "last")
#: How many activations are ranked at a time: 2^22 float64 take 32 MiB, their order as much again.
_RANKED_AT_ONCE: Final = 2**22


@dataclass(frozen=True)
class Contrast:
    """How each feature differs between two sets of texts, ``[d_sae]`` float64 each.

    Attributes:
        auroc: the probability that a text of the first set has the larger value than one of the
            second, ties counted half: the area under the ROC curve.
        difference: mean of the first set less that of the second.
        d: Cohen's d: ``difference / sqrt((s1^2 + s2^2) / 2)``, s with n - 1; NaN if that is
            0 / 0 or a set has one text, infinite if two constants differ.
        mean_first: mean over the texts of the first set.
        mean_second: the same of the second.
    """

    auroc: Float64Array
    difference: Float64Array
    d: Float64Array
    mean_first: Float64Array
    mean_second: Float64Array


def pooled(f: FloatArray, pool: str) -> FloatArray:
    """Pool a text's activations ``[tokens, d_sae]`` over its tokens: ``[d_sae]``.

    Args:
        f: of at least one token.
        pool: one of `POOLS`.

    Raises:
        ValueError: if ``pool`` is another word.
    """
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r} is not one of {', '.join(POOLS)}")
    values: FloatArray
    if pool == "mean":
        values = f.mean(axis=0, dtype=np.float64).astype(np.float32)
    else:
        values = f.max(axis=0) if pool == "max" else f[-1]
    return values


def contrast(first: FloatArray, second: FloatArray) -> Contrast:
    """Compare two sets of texts, ``[n, d_sae]`` and ``[m, d_sae]``, by their pooled activations."""
    mean_first, mean_second = _mean(first), _mean(second)
    difference = mean_first - mean_second
    return Contrast(
        auroc(first, second),
        difference,
        _cohens_d(first, second, difference),
        mean_first,
        mean_second,
    )


def auroc(first: FloatArray, second: FloatArray) -> Float64Array:
    """Area under the ROC curve of each column, by Mann and Whitney's rank sum; ties count half.

    Args:
        first: ``[n, d_sae]``.
        second: ``[m, d_sae]``.

    Returns:
        ``[d_sae]``: 1 if every value of ``first`` is larger than every one of ``second``.
    """
    n, m = len(first), len(second)
    columns = max(1, _RANKED_AT_ONCE // (n + m))
    found = np.empty(first.shape[1], dtype=np.float64)
    for start in range(0, first.shape[1], columns):
        part = slice(start, start + columns)
        rank = _ranks(np.concatenate([first[:, part], second[:, part]]))
        found[part] = (rank[:n].sum(axis=0) - n * (n + 1) / 2) / (n * m)
    return found


def strongest(score: Float64Array, difference: Float64Array, top_k: int) -> IntArray:
    """The ``top_k`` features of the highest score, best first; NaN is no score.

    Ties go to the larger absolute difference, then to the lower index.
    """
    candidates = np.flatnonzero(~np.isnan(score))
    order = np.lexsort((candidates, -np.abs(difference[candidates]), -score[candidates]))
    best: IntArray = candidates[order[:top_k]]
    return best


def attribution(f: FloatArray, gradient: FloatArray, W_dec: FloatArray) -> FloatArray:
    """What a score would lose if each feature were 0, to first order.

    ``sum over tokens of f_i * (gradient . W_dec_i)``: attribution patching (Nanda 2023) with the
    feature's own decoder row as its direction (Marks et al. 2024, "Sparse Feature Circuits").

    Args:
        f: ``[tokens, d_sae]`` activations.
        gradient: ``[tokens, d_in]``, of the score by the stream.
        W_dec: ``[d_sae, d_in]``.

    Returns:
        ``[d_sae]``.
    """
    lost: FloatArray = (f * (gradient @ W_dec.T)).sum(axis=0)
    return lost


def _mean(values: FloatArray) -> Float64Array:
    mean: Float64Array = values.mean(axis=0, dtype=np.float64)
    return mean


def _cohens_d(first: FloatArray, second: FloatArray, difference: Float64Array) -> Float64Array:
    if min(len(first), len(second)) < 2:
        return np.full_like(difference, np.nan)
    variance = (
        first.var(axis=0, dtype=np.float64, ddof=1) + second.var(axis=0, dtype=np.float64, ddof=1)
    ) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        d: Float64Array = difference / np.sqrt(variance)
    return d


def _ranks(values: FloatArray) -> Float64Array:
    """Ranks from 1 within each column of ``[n, d]``; equal values have the mean of theirs."""
    order = np.argsort(values, axis=0, kind="stable")
    in_order = np.take_along_axis(values, order, axis=0)
    place = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
    starts = np.ones(values.shape, dtype=np.bool_)
    starts[1:] = in_order[1:] != in_order[:-1]
    ends = np.ones(values.shape, dtype=np.bool_)
    ends[:-1] = starts[1:]
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=0)
    last = np.minimum.accumulate(np.where(ends, place, len(values))[::-1], axis=0)[::-1]
    ranks = np.empty(values.shape, dtype=np.float64)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=0)
    return ranks
