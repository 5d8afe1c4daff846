"""What a study wants to know about a text's features, on its way to the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple


class Window(NamedTuple):
    """Tokens by phase, kind and position.

    Attributes:
        coverage: bits as in `steering.request.plan.PlannedEdit`.
        start: the first position.
        end: one past the last position.
    """

    coverage: int
    start: int
    end: int


@dataclass(frozen=True)
class PlannedPool:
    """What `steering.request.probe.Pool` asks for; a token takes part if a window covers it.

    Attributes:
        sae: index of the SAE.
        windows: the tokens that take part.
        pool: a `steering.request.probe.Pooling`.
        scaled: whether activations are multiplied by the SAE's output scale.
        peaks: whether each token's largest activation is recorded too.
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
        windows: the tokens whose stream is kept.
        key: the name under which it is kept.
    """

    sae: int
    windows: tuple[Window, ...]
    key: str


PlannedProbe = PlannedPool | PlannedStream
_KINDS: Final[dict[str, type[PlannedProbe]]] = {"pool": PlannedPool, "stream": PlannedStream}


def probe_to_wire(probe: PlannedProbe) -> list[Any]:
    """A probe in plain types, for a plan: its kind, then the values of its fields in order."""
    (kind,) = (kind for kind, cls in _KINDS.items() if isinstance(probe, cls))
    return [kind, *vars(probe).values()]


def probe_from_wire(wire: Sequence[Any]) -> PlannedProbe:
    """The inverse of `probe_to_wire`."""
    kind, sae, windows, *rest = wire
    return _KINDS[kind](sae, tuple(Window(*window) for window in windows), *rest)
