"""Figures of a study's texts, from the final hidden states that were kept of them.

A text with missing rows has no figures; that does not touch the texts beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steering.worker.captures import Captures
from steering.worker.scores import Columns, Scores, SteeredSide


class ScoredTexts:
    """Figures of texts by the keys under which they were kept, in plain types; see `Scores`.

    Both methods are called on all ranks alike. They return None on a rank whose head has no logits,
    or that does not report.

    Args:
        captures: the final hidden states that are kept.
        scores: makes the figures.
    """

    def __init__(self, captures: Captures, scores: Scores) -> None:
        self.scores = scores
        self._captures = captures

    @torch.inference_mode()
    def compare(
        self,
        unsteered: str,
        steered: Sequence[tuple[str, list[int]]],
        targets: list[int],
        start: int,
        stop: int,
    ) -> list[dict[str, bytes] | None] | None:
        """Compare steered texts with an unsteered one.

        Args:
            unsteered: key of the unsteered text.
            steered: for each steered text its key, and the ids that it watches.
            targets: ids of the actual tokens of the rows, or an empty list.
            start: the first of the kept rows to compare.
            stop: one past the last.

        Returns:
            For each steered text the columns of `Scores.compare` as bytes, float32 or int64 in C
            order; None for a text with missing rows. None instead of the list if rows of the
            unsteered text are missing.
        """
        before = self._rows(unsteered, start, stop)
        if before is None:
            return None
        sides = {
            i: SteeredSide(rows, watched)
            for i, (key, watched) in enumerate(steered)
            if (rows := self._rows(key, start, stop)) is not None
        }
        found = self.scores.compare(before, list(sides.values()), targets)
        if found is None:
            return None
        of_side = dict(zip(sides, map(_packed, found), strict=True))
        return [of_side.get(i) for i in range(len(steered))]

    @torch.inference_mode()
    def log_probabilities(
        self, texts: Sequence[tuple[str, int, list[int]]]
    ) -> list[bytes | None] | None:
        """Log p of texts' tokens.

        Args:
            texts: for each text its key, the first of its kept rows to use, and ids of the actual
                tokens of these rows.

        Returns:
            For each text float32 as bytes; None for a text with missing rows. None instead of the
            list if no text has all its rows.
        """
        kept = {
            i: rows
            for i, (key, start, ids) in enumerate(texts)
            if (rows := self._rows(key, start, start + len(ids))) is not None
        }
        if not kept:
            return None
        targets = [token for i in kept for token in texts[i][2]]
        found = self.scores.log_probabilities(torch.cat(list(kept.values())), targets)
        if found is None:
            return None
        parts = torch.split(found, [len(rows) for rows in kept.values()])
        of_text = {i: part.numpy().tobytes() for i, part in zip(kept, parts, strict=True)}
        return [of_text.get(i) for i in range(len(texts))]

    def _rows(self, key: str, start: int, stop: int) -> Tensor | None:
        kept = self._captures.rows(key)
        return None if kept is None else kept[start:stop]


def _packed(columns: Columns) -> dict[str, bytes]:
    return {name: column.numpy().tobytes() for name, column in columns.items()}
