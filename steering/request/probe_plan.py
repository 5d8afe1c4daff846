"""What a study wants to know of a text's features, on its way to the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Window(NamedTuple):
    """Tokens by phase, kind and position: bits of a coverage, and positions ``[start, end)``."""

    coverage: int
    start: int
    end: int


@dataclass(frozen=True)
class PlannedPool:
    """What `steering.request.probe.Pool` asks for; a token takes part if a window covers it.

    Attributes:
        sae: index of the SAE.
        windows: which tokens.
        pool: a `steering.request.probe.Pooling`.
        scaled: activations are summed times the SAE's output scale.
        peaks: each token's largest activation too.
    """

    sae: int
    windows: tuple[Window, ...]
    pool: str
    scaled: bool
    peaks: bool


@dataclass(frozen=True)
class PlannedCapture:
    """What `steering.request.probe.Keep` asks for.

    Attributes:
        sae: index of the SAE.
        windows: which tokens.
        key: what the stream is kept under.
    """

    sae: int
    windows: tuple[Window, ...]
    key: str


PlannedProbe = PlannedPool | PlannedCapture


def probe_from_wire(fields: Sequence[Any]) -> PlannedProbe:
    """A probe of the values of its fields, in their order."""
    sae, windows, *rest = fields
    made = tuple(Window(*window) for window in windows)
    return PlannedPool(sae, made, *rest) if len(rest) == 3 else PlannedCapture(sae, made, *rest)
