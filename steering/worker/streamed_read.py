"""What was read of one choice since it was last asked for."""

from __future__ import annotations

from dataclasses import dataclass

from sae.arrays import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class StreamedRead:
    """Tokens of one request (or one child) in the order in which they were computed.

    Attributes:
        key: the plan's key.
        child: of ``n > 1``, else 0.
        positions: ``[n]``; one may come again, after a rejected speculation or a preemption.
        covered: ``[n]``; False for a token that is not read: it takes back what stood there before.
        latents: ``[n, top_k]`` int32, best first.
        values: ``[n, top_k]`` float32; not above 0 where fewer features fired.
    """

    key: str
    child: int
    positions: IntArray
    covered: BoolArray
    latents: IntArray
    values: FloatArray
