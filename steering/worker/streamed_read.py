"""What was read of one choice since it was last asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.arrays import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class StreamedRead:
    """Tokens of one request (or one child) in the order in which they were computed.

    Attributes:
        key: the plan's key.
        child: which of the choices of ``n > 1``, else 0.
        positions: ``[n]``; one may come again after a rejected speculation or a preemption.
        covered: ``[n]`` bool; False for a token that is not read, which takes back what was read at
            its position before.
        latents: ``[n, top_k]`` int32, best first.
        values: ``[n, top_k]`` float32; 0 in the last columns of a token on which fewer features
            fired.
    """

    key: str
    child: int
    positions: IntArray
    covered: BoolArray
    latents: IntArray
    values: FloatArray

    def to_wire(self) -> list[Any]:
        """Plain types, for msgpack."""
        columns = (
            self.positions.astype(np.int64),
            self.covered.astype(np.bool_),
            self.latents.astype(np.int32),
            self.values.astype(np.float32),
        )
        return [self.key, self.child, *(column.tobytes() for column in columns)]

    @classmethod
    def from_wire(cls, wire: Sequence[Any]) -> StreamedRead:
        """The inverse of `to_wire`."""
        key, child, positions, covered, latents, values = wire
        position = np.frombuffer(positions, dtype=np.int64)
        shape = (len(position), -1)
        return cls(
            key,
            child,
            position,
            np.frombuffer(covered, dtype=np.bool_),
            np.frombuffer(latents, dtype=np.int32).reshape(shape),
            np.frombuffer(values, dtype=np.float32).reshape(shape),
        )

    def followed_by(self, later: StreamedRead) -> StreamedRead:
        """These rows, followed by later ones of the same request."""
        return StreamedRead(
            self.key,
            self.child,
            np.concatenate((self.positions, later.positions)),
            np.concatenate((self.covered, later.covered)),
            np.concatenate((self.latents, later.latents)),
            np.concatenate((self.values, later.values)),
        )
