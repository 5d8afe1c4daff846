"""Rows that passes leave, by token position: computing a position again replaces its row."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sae.arrays import IntArray

#: More arrays than this are merged into one, which also drops the rows that were replaced.
_MOST_PARTS: Final = 64

Column = npt.NDArray[Any]


class RowsByPosition:
    """Rows in several columns, kept as they came and put in order when they are asked for."""

    def __init__(self) -> None:
        self._parts: list[tuple[IntArray, tuple[Column, ...]]] = []

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return sum(
            positions.nbytes + sum(column.nbytes for column in columns)
            for positions, columns in self._parts
        )

    def put(self, positions: IntArray, *columns: Column) -> None:
        """Add rows.

        Args:
            positions: ``[n]``.
            columns: ``[n, ...]`` each; as many, and of the same shapes and dtypes, in every call.
        """
        self._parts.append((positions, columns))
        if len(self._parts) > _MOST_PARTS:
            self._parts = [self.latest()]

    def latest(self) -> tuple[IntArray, tuple[Column, ...]]:
        """The last row of each position, by ascending position; no columns if there are no rows."""
        if not self._parts:
            return np.empty(0, dtype=np.int64), ()
        positions = np.concatenate([part[0] for part in self._parts])
        columns = zip(*(part[1] for part in self._parts), strict=True)
        # Backwards, so that of equal positions the one that came last is found.
        found, where = np.unique(positions[::-1], return_index=True)
        last = len(positions) - 1 - where
        return found, tuple(np.concatenate(column)[last] for column in columns)
