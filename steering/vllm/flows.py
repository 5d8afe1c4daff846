"""What a tensor holds, as far as a layer's ``forward`` shows it: a sum of named parts.

The parts are the layer's inputs and the outputs of the modules that it calls, each with the
factors by which it was multiplied on its way. `forward_trace` computes with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

HIDDEN: Final = "hidden_states"
RESIDUAL: Final = "residual"
#: The part that an edit adds, if a trace follows one.
EDIT: Final = "the edit"

#: Factors of a part, one number for each multiplication; equal tuples are equal factors.
Factors = tuple[int, ...]

_numbers = itertools.count(1)


@dataclass(eq=False)
class Flow:
    """A tensor, compared by identity: an in-place operation shows under all of its names.

    Attributes:
        parts: the parts that it is the sum of.
        buffer: whether it was made empty, for a module to write into.
    """

    parts: dict[str, Factors] = field(default_factory=dict)
    buffer: bool = False

    def add(self, other: Flow) -> None:
        """``self += other``"""
        for part, factors in other.parts.items():
            # The same part twice is that part times a new factor.
            self.parts[part] = (next(_numbers),) if part in self.parts else factors

    def scale(self) -> None:
        """``self *= something``"""
        number = next(_numbers)
        self.parts = {part: (*factors, number) for part, factors in self.parts.items()}

    def copy(self) -> Flow:
        """Another tensor with the same content."""
        return Flow(dict(self.parts))

    def holds_stream(self) -> bool:
        """Whether an input of the layer is among the parts, so that it is more than a branch."""
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
    """An attribute of the layer: a module, or something whose kind is not known.

    Attributes:
        path: as in ``self.path``.
        norm: for a norm, what it returns for two tensors: ``adds`` (the norm of their sum, and the
            sum), ``passes`` (the norm of the first, and the second as it was) or ``unknown``;
            ``one`` if it takes one tensor. ``identity`` for a dropout. None for what is no norm.
        module: the module itself; None if the model is not loaded.
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
        forward: whether it was called as a module, not by another method or in a function.
        norm: as `Attribute.norm`.
        inputs: where each tensor stands in the call (position or name), and its parts at the time.
        buffer: whether it writes its output into one of its arguments.
    """

    path: str
    part: str
    forward: bool
    norm: str | None
    inputs: list[tuple[int | str, dict[str, Factors]]]
    buffer: bool = False

    def sum_of_inputs(self) -> dict[str, Factors]:
        """The parts of what an adding norm normalizes, or of another module's first tensor."""
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
