"""The source code and the attributes of a loaded model's layer, for `forward_trace`."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, nn

from steering.vllm.flows import Attribute, Function, Known, Unknown, Value

#: The module of vLLM's own norms: given two tensors they return the norm of the sum, and the sum.
ADDING_NORMS: Final = "vllm.model_executor.layers.layernorm"
_NORM_CLASS: Final = re.compile(r"norm", re.IGNORECASE)
_NO_NORM_CLASS: Final = re.compile(r"att(ention|n)|block|layer$|mlp|mixer", re.IGNORECASE)
_IDENTITY_CLASS: Final = re.compile(r"^(Dropout|Identity|DropPath)$")
#: Set on the classes that `installation` derives from a module's own class.
STEERED: Final = "_vllm_sae_steered"


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its model made it, whatever has been installed on it since."""
    return next(cls for cls in type(module).__mro__ if STEERED not in vars(cls))


class LayerSource:
    """A loaded layer: the source text of its class, and its attributes. See `Subject`."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._class = original_class(layer)

    def method(self, name: str) -> ast.FunctionDef | None:
        """A method of its class; None if there is none, or if its source is not available."""
        function = getattr(self._class, name, None)
        return None if function is None else function_tree(inspect.unwrap(function))

    def attribute(self, path: str) -> Value:
        """``self.path``: an `Attribute` for a module, `Known` for a plain value, else `Unknown`."""
        value: Any = self._layer
        for name in path.split("."):
            try:
                value = value[int(name)] if name.isdigit() else getattr(value, name)
            except (AttributeError, IndexError, KeyError, TypeError):
                return Unknown(f"self.{path}")
        if isinstance(value, nn.Module):
            return Attribute(path, norm_kind(original_class(value)), value)
        # A tensor's numbers do not depend on the batch, but are not looked at.
        if isinstance(value, Tensor) or inspect.isroutine(value):
            return Unknown(f"self.{path}")
        return Known(value)

    def outside(self, name: str) -> Value:
        """A global of the module that defines the class's forward."""
        function = inspect.unwrap(self._class.forward)
        value = getattr(function, "__globals__", {}).get(name)
        return Function(name, value)

    def is_instance(self, attribute: Attribute, cls: Value) -> bool | None:
        """Whether a module of the layer is of a class; None if that is not known."""
        module, wanted = attribute.module, getattr(cls, "value", None)
        if attribute.path == "":
            module = self._layer
        if module is None or not isinstance(wanted, type):
            return None
        return isinstance(module, wanted)


def norm_kind(cls: type[nn.Module]) -> str | None:
    """What a module of this class does as a norm; see `Attribute.norm`."""
    if _IDENTITY_CLASS.search(cls.__name__):
        return "identity"
    if not _NORM_CLASS.search(cls.__name__) or _NO_NORM_CLASS.search(cls.__name__):
        return None
    if any(base.__module__ == ADDING_NORMS for base in cls.__mro__):
        return "adds"
    # What one of vLLM's custom ops does is written in its `forward_native`.
    tree = function_tree(inspect.unwrap(getattr(cls, "forward_native", cls.forward)))
    return "one" if tree is None else norm_kind_of(tree)


def norm_kind_of(forward: ast.FunctionDef) -> str:
    """What a norm does, by its forward; ``unknown`` if the code does not show it."""
    names = [argument.arg for argument in forward.args.args[1:]]
    pairs = [
        part
        for node in ast.walk(forward)
        if isinstance(node, ast.Return) and node.value is not None
        for part in ast.walk(node.value)
        if isinstance(part, ast.Tuple)
    ]
    if len(names) < 2 or not pairs:
        return "one"
    second = names[1]
    uses = sum(_is_name(node, second) for node in ast.walk(forward))
    harmless = sum(
        _is_name(part, second)
        for node in ast.walk(forward)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot)
        for part in ast.walk(node)
    )
    handed_on = sum(_is_name(pair.elts[-1], second) for pair in pairs)
    if uses == harmless + handed_on == harmless + len(pairs):
        return "passes"
    added = any(
        any(_is_name(part, second) for part in ast.walk(node))
        and (
            (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add))
            or (isinstance(node, ast.Call) and "add" in ast.unparse(node.func))
        )
        for node in ast.walk(forward)
    )
    return "adds" if added else "unknown"


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


@functools.cache
def function_tree(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """The syntax tree of a function; None if its source is not available."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    found = tree.body[0]
    return found if isinstance(found, ast.FunctionDef) else None
