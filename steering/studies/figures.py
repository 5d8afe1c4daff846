"""What a comparison of two runs of a text says about each scored position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from sae.arrays import DoubleArray, IntArray
from steering.report import Report
from steering.studies.changes import Changes


@dataclass(frozen=True)
class Figures:
    """The figures of ``n`` scored positions, of whole distributions and in nats.

    All are float64 ``[n]``, but for token ids and ranks (int64) and what is said otherwise.

    Attributes:
        kl: KL(unsteered || steered) of the distributions that predict each position.
        reverse_kl: KL(steered || unsteered).
        unsteered: log p of the actual token; NaN if only what follows a text was asked for.
        steered: the same for the steered side.
        top_unsteered: the likeliest token.
        top_steered: the same for the steered side.
        confidence_unsteered: log p of the likeliest token.
        confidence_steered: the same for the steered side.
        watched_unsteered: ``[n, w]`` log p of the ``w`` watched tokens.
        watched_steered: the same for the steered side.
        ranks_steered: ``[n, w]`` how many tokens are strictly likelier than each watched one.
        report: the report of the steered side's edits; None if it has none or did not ask.
        changes: the changes of features, at each SAE that the steered side names.
    """

    kl: DoubleArray
    reverse_kl: DoubleArray
    unsteered: DoubleArray
    steered: DoubleArray
    top_unsteered: IntArray
    top_steered: IntArray
    confidence_unsteered: DoubleArray
    confidence_steered: DoubleArray
    watched_unsteered: DoubleArray
    watched_steered: DoubleArray
    ranks_steered: IntArray
    report: Report | None = None
    changes: tuple[Changes, ...] = ()

    @classmethod
    def of(
        cls,
        parts: Sequence[dict[str, bytes]],
        report: Report | None,
        changes: tuple[Changes, ...] = (),
    ) -> Figures:
        """The figures that `steering.worker.scored_texts.ScoredTexts.compare` sent.

        Args:
            parts: what it sent for consecutive rows.
            report: see `report`.
            changes: see `changes`.
        """
        columns = {name: _unpacked(name, parts) for name in parts[0]}
        n = len(columns["kl"])
        for name in _WATCHED:
            columns[name] = columns[name].reshape(n, -1)
        return cls(**columns, report=report, changes=changes)


_WATCHED: Final = ("watched_unsteered", "watched_steered", "ranks_steered")
_INT64: Final = frozenset({"top_unsteered", "top_steered", "ranks_steered"})
assert {*_WATCHED, *_INT64} <= {column.name for column in fields(Figures)}


def _unpacked(name: str, parts: Sequence[dict[str, bytes]]) -> Any:
    data = b"".join(part[name] for part in parts)
    if name in _INT64:
        return np.frombuffer(data, np.int64)
    return np.frombuffer(data, np.float32).astype(np.float64)
