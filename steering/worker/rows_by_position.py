"""Rows that passes leave behind, by token position: a position computed again replaces its row."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sae.arrays import IntArray

#: Arrays are merged into one beyond so many, which also drops the rows that were replaced.
_MOST_PARTS: Final = 64

Column = npt.NDArray[Any]


class RowsByPosition:
    """Columns of rows as they came, taken apart only when they are asked for."""

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
        """Add rows: ``[n]`` positions and columns ``[n, ...]``, each like those before."""
        self._parts.append((positions, columns))
        if len(self._parts) > _MOST_PARTS:
            self._parts = [self.latest()]

    def latest(self) -> tuple[IntArray, tuple[Column, ...]]:
        """The last row of each position, by ascending position; no columns if there are none."""
        if not self._parts:
            return np.empty(0, dtype=np.int64), ()
        positions = np.concatenate([part[0] for part in self._parts])
        columns = zip(*(part[1] for part in self._parts), strict=True)
        # Backwards, so that the first of equal positions is the last that came.
        found, where = np.unique(positions[::-1], return_index=True)
        last = len(positions) - 1 - where
        return found, tuple(np.concatenate(column)[last] for column in columns)
