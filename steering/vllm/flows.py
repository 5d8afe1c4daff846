"""What a tensor holds, as far as a layer's ``forward`` shows it: a sum of named parts.

The parts are the layer's inputs and the outputs of the modules that it calls, each with the
factors that it was multiplied by on its way. ``forward_trace.py`` computes with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

HIDDEN: Final = "hidden_states"
RESIDUAL: Final = "residual"
#: What an edit adds, where a trace is asked how far it comes.
EDIT: Final = "the edit"

#: Factors of a part, one number for each multiplication; equal tuples are equal factors.
Factors = tuple[int, ...]

_numbers = itertools.count(1)


@dataclass(eq=False)
class Flow:
    """A tensor, by identity: in-place operations are seen under all of its names.

    Attributes:
        parts: what it is the sum of.
        buffer: made empty, to be written by a module.
    """

    parts: dict[str, Factors] = field(default_factory=dict)
    buffer: bool = False

    def add(self, other: Flow) -> None:
        """``self += other``"""
        for part, factors in other.parts.items():
            # Twice the same part is a factor of its own.
            self.parts[part] = (next(_numbers),) if part in self.parts else factors

    def scale(self) -> None:
        """``self *= something``"""
        number = next(_numbers)
        self.parts = {part: (*factors, number) for part, factors in self.parts.items()}

    def copy(self) -> Flow:
        """Another tensor of the same content."""
        return Flow(dict(self.parts))

    def holds_stream(self) -> bool:
        """Whether a layer's input is among the parts, so that it is not a branch alone."""
        return HIDDEN in self.parts or RESIDUAL in self.parts


@dataclass(frozen=True)
class Known:
    """A Python value that does not depend on the batch."""

    value: Any


@dataclass(frozen=True)
class Unknown:
    """A value that is neither a tensor of the stream's shape nor known; ``text`` names it."""

    text: str


@dataclass(frozen=True)
class Attribute:
    """An attribute of the layer: a module, or of a kind that is not known.

    Attributes:
        path: as in ``self.path``.
        norm: what it does with two tensors: ``adds`` (the norm of their sum, and the sum),
            ``passes`` (the norm of the first, and the second as it was); ``one`` for a norm that
            takes one; ``unknown`` where that cannot be told; ``identity`` for a dropout; None for
            what is no norm.
        module: the module itself, where a model is at hand.
    """

    path: str
    norm: str | None = None
    module: Any = None


@dataclass(frozen=True)
class Method:
    """A method of a module of the layer, or of the layer itself (empty path)."""

    owner: Attribute
    name: str


@dataclass(frozen=True)
class Function:
    """A function from outside, by its last name."""

    name: str
    value: Any = None


@dataclass(eq=False)
class Mapped:
    """A dictionary with constant keys."""

    items: dict[str, Value] = field(default_factory=dict)


@dataclass
class Call:
    """A module that the layer called.

    Attributes:
        path: as in ``self.path``.
        part: the name of its output in a `Flow`.
        forward: called as a module, not by another method or in a function.
        norm: as `Attribute.norm`.
        inputs: its tensors and where each stands in the call, with their parts as they were.
        buffer: it writes its output into one of its arguments.
    """

    path: str
    part: str
    forward: bool
    norm: str | None
    inputs: list[tuple[int | str, dict[str, Factors]]]
    buffer: bool = False

    def sum_of_inputs(self) -> dict[str, Factors]:
        """What an adding norm is the norm of; a plain module's first tensor."""
        total = Flow(dict(self.inputs[0][1])) if self.inputs else Flow()
        if self.norm == "adds" and len(self.inputs) > 1:
            total.add(Flow(dict(self.inputs[1][1])))
        return total.parts


Value = Flow | Known | Unknown | Attribute | Method | Function | Mapped | tuple[Any, ...]


def flows_in(value: Value | Iterable[Value]) -> list[Flow]:
    """Every tensor in a value."""
    if isinstance(value, Flow):
        return [value]
    if isinstance(value, Mapped):
        return [flow for item in value.items.values() for flow in flows_in(item)]
    if isinstance(value, tuple | list):
        return [flow for item in value for flow in flows_in(item)]
    return []
