"""What a study wants to know of a text's features, on its way to the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple


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
class PlannedStream:
    """What `steering.request.probe.KeepStream` asks for.

    Attributes:
        sae: index of the SAE.
        windows: which tokens.
        key: what the stream is kept under.
    """

    sae: int
    windows: tuple[Window, ...]
    key: str


PlannedProbe = PlannedPool | PlannedStream
_KINDS: Final[dict[str, type[PlannedProbe]]] = {"pool": PlannedPool, "stream": PlannedStream}


def probe_to_wire(probe: PlannedProbe) -> list[Any]:
    """Plain types for a plan: the kind, and the values of the fields in their order."""
    (kind,) = (kind for kind, cls in _KINDS.items() if isinstance(probe, cls))
    return [kind, *vars(probe).values()]


def probe_from_wire(wire: Sequence[Any]) -> PlannedProbe:
    """The inverse of `probe_to_wire`."""
    kind, sae, windows, *rest = wire
    return _KINDS[kind](sae, tuple(Window(*window) for window in windows), *rest)
