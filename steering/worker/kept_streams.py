"""The stream where an SAE reads it, kept of one run of a text to be compared with another run's.

Streams lie in the host's memory. They get there with the copies that every pass makes for its
records, since only the device knows which tokens are special. A study names each run by a key of
its own, and has what is kept under it forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sae.arrays import BoolArray, FloatArray, IntArray
from steering.worker.rows_by_position import RowsByPosition


class KeptStream(NamedTuple):
    """The stream at one SAE, of the tokens that take part.

    Attributes:
        offset: ``[n]`` int64 ascending, positions less the prompt's length. So texts whose prompts
            differ agree on the tokens of their completion.
        x: ``[n, d_in]`` float32, the stream after the edits of the hook point.
        asked: ``[n]`` float32, the sum over this SAE's edits of the squared change ``f' - f`` that
            each asks for.
        edited: latents of this SAE that the run edits.
    """

    offset: IntArray
    x: FloatArray
    asked: FloatArray
    edited: tuple[int, ...] = ()


class StreamRows:
    """The stream of one running request, as its passes leave it behind.

    Args:
        prompt_len: tokens of the request's prompt.
        edited: see `KeptStream`.
    """

    def __init__(self, prompt_len: int, edited: tuple[int, ...] = ()) -> None:
        self._prompt_len = prompt_len
        self._edited = edited
        self._rows = RowsByPosition()

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return self._rows.nbytes

    def put(
        self, positions: IntArray, covered: BoolArray, x: FloatArray, asked: FloatArray
    ) -> None:
        """Add tokens of a pass.

        Args:
            positions: ``[n]``.
            covered: ``[n]`` bool, the tokens that take part.
            x: ``[n, d_in]``, see `KeptStream`.
            asked: ``[n]``, see `KeptStream`.
        """
        self._rows.put(positions[covered], x[covered], asked[covered])

    def below(self, limit: int) -> KeptStream | None:
        """The stream at positions below ``limit``; None if none of them takes part."""
        positions, columns = self._rows.latest()
        counted = positions < limit
        if not counted.any():
            return None
        x, asked = (column[counted] for column in columns)
        return KeptStream(positions[counted] - self._prompt_len, x, asked, self._edited)


class KeptStreams:
    """Streams by the key of their run and the index of the SAE, until the key is forgotten."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[int, KeptStream]] = {}

    def keep(self, key: str, sae: int, stream: KeptStream) -> None:
        """Keep a stream in place of what was kept there before."""
        self._kept.setdefault(key, {})[sae] = stream

    def get(self, key: str, sae: int) -> KeptStream | None:
        """What was kept; None if nothing is, or if it was forgotten."""
        return self._kept.get(key, {}).get(sae)

    def forget(self, keys: Iterable[str]) -> None:
        """Forget what is kept under these keys, if anything is."""
        for key in keys:
            self._kept.pop(key, None)

    def __len__(self) -> int:
        return len(self._kept)


def counterparts(unsteered: KeptStream, steered: KeptStream) -> IntArray:
    """``[n]`` index in the unsteered run of each of the steered run's tokens; -1 if it has none."""
    where = np.searchsorted(unsteered.offset, steered.offset)
    # An index past the last is replaced by the last, whose offset then differs.
    nearest = np.minimum(where, len(unsteered.offset) - 1)
    return np.where(unsteered.offset[nearest] == steered.offset, nearest, -1)
