"""What calls in a layer's ``forward`` make of the tensors that they are given.

These are calls of modules, of functions and of tensor methods. Only the values of their arguments
matter here, not the code that made them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from steering.vllm.flows import (
    EDIT,
    Attribute,
    Call,
    Flow,
    Function,
    Known,
    Unknown,
    Value,
    flows_in,
)

#: Functions, by last name, that return ``norm(x + residual), x + residual``.
_ADDING_FUNCTIONS: Final = ("fused_allreduce_rms_norm", "fused_allreduce_gemma_rms_norm")
#: Sums over tensor-parallel ranks, which change nothing if there is only one.
_REDUCTIONS: Final = ("tensor_model_parallel_all_reduce",)
_EMPTY_BUFFERS: Final = ("empty_like", "zeros_like", "empty", "zeros")
#: Tensor methods whose result holds the same numbers.
_COPIES: Final = ("clone", "contiguous", "to", "float", "type_as", "view", "reshape", "half")


class NotUnderstood(Exception):
    """The code does something that the tracer does not know."""


@dataclass(frozen=True)
class EditAt:
    """An edit in place, of what ``self.path`` returns if ``output``, else of its first tensor."""

    path: str
    output: bool


@dataclass
class Calls:
    """The modules that one way through the code calls, in order.

    Attributes:
        tensor_parallel: how many ranks a tensor-parallel group has.
        edit: an edit to follow, as the part `EDIT`; None if there is none.
        made: the calls so far.
    """

    tensor_parallel: int
    edit: EditAt | None
    made: list[Call] = field(default_factory=list)

    def module(
        self, module: Attribute, args: Sequence[tuple[int | str, Value]], *, forward: bool
    ) -> Value:
        """What a module returns. The call is noted in `made`.

        Args:
            module: the module.
            args: what it is given, by position or name.
            forward: whether it is called as a module, not by another method or in a function.

        Raises:
            NotUnderstood: if what the module makes of the stream cannot be told.
        """
        tensors = [(key, value) for key, value in args if isinstance(value, Flow)]
        if module.norm == "identity" and len(tensors) == 1:
            return tensors[0][1].copy()
        nested = flows_in([value for _, value in args if not isinstance(value, Flow)])
        if any(flow.holds_stream() for flow in nested):
            raise NotUnderstood(f"self.{module.path} is given a stream inside something else")
        edited = self.edit if self.edit is not None and self.edit.path == module.path else None
        if edited is not None and not edited.output and tensors:
            tensors[0][1].parts[EDIT] = ()
        buffers = [flow for _, flow in tensors if flow.buffer and not flow.parts]
        inputs = [(key, dict(flow.parts)) for key, flow in tensors if flow not in buffers]
        part = f"{module.path}#{len(self.made)}"
        norm = module.norm
        if norm is not None and len(tensors) < 2:
            norm = "one"
        self.made.append(Call(module.path, part, forward, norm, inputs, bool(buffers)))
        made = Flow({part: ()})
        if edited is not None and edited.output:
            made.parts[EDIT] = ()
        if norm in ("adds", "passes", "unknown"):
            return self._norm_of_two(norm, made, tensors)
        for buffer in buffers:
            buffer.parts = dict(made.parts)
        # A norm that passes a residual on returns a pair even if it is given none.
        if norm == "one" and module.norm == "passes":
            return (made, Known(None))
        return made

    def _norm_of_two(
        self, norm: str, made: Flow, tensors: Sequence[tuple[int | str, Flow]]
    ) -> Value:
        if len(tensors) != 2 or norm == "unknown":
            raise NotUnderstood("it has a norm of several tensors that is not understood")
        (_, first), (_, second) = tensors
        if norm == "passes":
            return (made, second)
        total = first.copy()
        total.add(second)
        return (made, total)

    def function(
        self, function: Function, args: Sequence[tuple[int | str, Value]], text: str
    ) -> Value:
        """What a function from outside the layer returns; ``text`` is the call in the source.

        Raises:
            NotUnderstood: see `module`, if the function applies one.
        """
        values = [value for _, value in args]
        flows = flows_in(values)
        if function.name in _ADDING_FUNCTIONS and len(values) == 3:
            norm = values[2]
            if isinstance(norm, Attribute):
                # The sum is the norm's, but no module is called.
                return self.module(
                    Attribute(norm.path, "adds", norm.module), args[:2], forward=False
                )
        if function.name in _REDUCTIONS and len(flows) == 1:
            reduced = flows[0].copy()
            if self.tensor_parallel > 1:
                reduced.scale()
            return reduced
        if function.name in _EMPTY_BUFFERS:
            return Flow(buffer=True)
        if function.name == "cast" and len(values) == 2:
            value: Value = values[1]
            return value
        if function.name == "clone" and len(flows) == 1:
            return flows[0].copy()
        if not flows:
            return _computed(function, values) or Unknown(text)
        result = Flow()
        for flow in flows:
            result.add(flow)
        lose(result, text)
        return result

    def tensor_method(
        self, owner: Flow, name: str, args: Sequence[tuple[int | str, Value]], text: str
    ) -> Value:
        """What a method of a tensor returns; ``text`` is the call in the source."""
        others = flows_in([value for _, value in args])
        if name in _COPIES and not others:
            return owner.copy()
        if name in ("size", "dim", "numel", "stride", "is_contiguous", "element_size"):
            return Unknown(text)
        if name == "add" and len(others) == len(args) == 1:
            total = owner.copy()
            total.add(others[0])
            return total
        if name.endswith("_") and not name.endswith("__"):
            if name == "add_" and len(others) == len(args) == 1:
                owner.add(others[0])
            else:
                lose(owner, text)
            return owner
        result = owner.copy()
        for other in others:
            result.add(other)
        lose(result, text)
        return result


def lose(flow: Flow, text: str) -> None:
    """Note that something unknown was made of a tensor, in place: its parts are no longer known."""
    flow.parts = {f"{text} of {part}": factors for part, factors in flow.parts.items()}


def _computed(function: Function, values: Sequence[Value]) -> Value | None:
    if function.value in (math.sqrt, len, int, float, bool) and all(
        isinstance(value, Known) for value in values
    ):
        return Known(function.value(*(value.value for value in values)))  # type: ignore[union-attr]
    return None
