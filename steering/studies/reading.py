"""Features' activations over texts, summed up in the worker."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sae.arrays import DoubleArray, FloatArray, IntArray
from steering.request.accepted import Accepted
from steering.request.catalog import Catalog
from steering.request.probe import Pool
from steering.studies.kept_runs import UNSTEERED
from steering.studies.study import Reader
from steering.vllm.reader import Run, Text


@dataclass(frozen=True)
class Pooled:
    """Every feature's activations over one text; a feature that is not listed never fired.

    Attributes:
        d_sae: how many features the SAE has.
        tokens: how many tokens took part.
        features: ``[m]`` int32 indices, ascending.
        total: ``[m]`` float64 sum of the activations, scaled if that was asked for.
        count: ``[m]`` int32 number of tokens on which the feature fires.
        firing: ``[m]`` float64 sum of the activations there, never scaled.
        pooled: ``[m]`` float64 mean, largest or last activation.
        peaks: the positions that took part, ``[tokens]`` int64, and the largest activation at each,
            ``[tokens]`` float32; None if they were not asked for.
    """

    d_sae: int
    tokens: int
    features: IntArray
    total: DoubleArray
    count: IntArray
    firing: DoubleArray
    pooled: DoubleArray
    peaks: tuple[IntArray, FloatArray] | None = None

    @classmethod
    def of(cls, figures: Mapping[str, Any] | None, pool: Pool, d_sae: int) -> Pooled:
        """What `steering.worker.pooled` found.

        Args:
            figures: what it sent; None if no token took part.
            pool: what was asked for.
            d_sae: how many features the SAE has.
        """
        if figures is None:
            none = np.empty(0, np.int32)
            return cls(d_sae, 0, none, np.empty(0), none, np.empty(0), np.empty(0))
        tokens, total = figures["tokens"], np.frombuffer(figures["total"], np.float64)
        if figures["pooled"] is None:
            pooled = total / max(tokens, 1)
        else:
            pooled = np.frombuffer(figures["pooled"], np.float32).astype(np.float64)
        peaks = figures["peaks"]
        return cls(
            d_sae,
            tokens,
            np.frombuffer(figures["latents"], np.int32),
            total,
            np.frombuffer(figures["count"], np.int32),
            total if figures["firing"] is None else np.frombuffer(figures["firing"], np.float64),
            pooled,
            None
            if peaks is None
            else (np.frombuffer(peaks[0], np.int64), np.frombuffer(peaks[1], np.float32)),
        )

    def dense(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``[m]`` values as ``[d_sae]``, zero for the features that are not listed."""
        found = np.zeros(self.d_sae, dtype=values.dtype)
        found[self.features] = values
        return found


async def pooled(
    reader: Reader,
    catalog: Catalog,
    texts: Sequence[Text],
    pool: Pool,
    *,
    accepted: Accepted | None = None,
    done: Callable[[], None] | None = None,
) -> list[Pooled]:
    """Read whole texts and sum up each one's activations.

    Args:
        reader: runs the texts.
        catalog: the SAEs.
        texts: texts of at least one token each.
        pool: the SAE, the tokens that take part, and how they are summed up.
        accepted: how the texts are steered; None for the model as it is.
        done: called for each text that is read.

    Returns:
        What was read in each text, in their order.

    Raises:
        SteeringError: ``invalid_weights`` if the SAE has weights that are not finite, or if its
            file has changed.
    """
    await catalog.prepare_whole(pool.sae)
    probed = replace(accepted or UNSTEERED, probes=(pool,))

    def run(text: Text) -> Run:
        # A block that another engine computed would come without activations.
        return Run.of(text, probed, salt=uuid.uuid4().hex if reader.external_blocks else None)

    d_sae = catalog.card(pool.sae).d_sae
    finished = await reader.all(
        map(run, texts),
        None if done is None else lambda _: done(),
    )
    found = []
    for of_text in finished:
        assert of_text.report is not None
        figures = of_text.report.probed[0] if of_text.report.probed else None
        found.append(Pooled.of(figures, pool, d_sae))
    return found


def mean_where_it_fires(read: Sequence[Pooled]) -> DoubleArray:
    """``[d_sae]`` float64: each feature's mean activation over the tokens where it fires.

    NaN for a feature that never fires.

    Args:
        read: what was read in at least one text.
    """
    total, count = np.zeros(read[0].d_sae), np.zeros(read[0].d_sae)
    for of_text in read:
        total += of_text.dense(of_text.firing)
        count += of_text.dense(of_text.count)
    mean: DoubleArray = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return mean
