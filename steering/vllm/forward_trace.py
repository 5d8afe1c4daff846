"""Follows a layer's ``forward`` by its syntax tree and tells what it makes of the stream.

Nothing is run. Conditions that the layer's attributes decide are decided; at others both ways are
followed. What is not understood raises `NotUnderstood`, never passes for something else.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from steering.vllm.flows import (
    EDIT,
    HIDDEN,
    RESIDUAL,
    Attribute,
    Call,
    Flow,
    Function,
    Known,
    Mapped,
    Method,
    Unknown,
    Value,
    flows_in,
)

_MOST_PATHS: Final = 256
_DEEPEST_CALL: Final = 4
#: ``norm(x + residual), x + residual`` in a function; by last name.
_ADDING_FUNCTIONS: Final = ("fused_allreduce_rms_norm", "fused_allreduce_gemma_rms_norm")
#: Sums over tensor-parallel ranks; the same tensor where there is one.
_REDUCTIONS: Final = ("tensor_model_parallel_all_reduce",)
_EMPTY_BUFFERS: Final = ("empty_like", "zeros_like", "empty", "zeros")
#: Tensor methods whose result holds the same numbers.
_COPIES: Final = ("clone", "contiguous", "to", "float", "type_as", "view", "reshape", "half")


class NotUnderstood(Exception):
    """The code does something that the tracer does not know."""


class _Dead(Exception):
    """This way through the code raises or cannot be gone."""


class _Fork(Exception):
    """A condition that must be gone both ways."""

    def __init__(self, key: str) -> None:
        self.key = key


class Subject(Protocol):
    """A layer whose code is followed: one that is at hand, or its class's source text."""

    def method(self, name: str) -> ast.FunctionDef | None:
        """A method of its class."""

    def attribute(self, path: str) -> Value:
        """``self.path``, a dotted path; `Unknown` where the source does not say."""

    def outside(self, name: str) -> Value:
        """A global name of the class's module."""

    def is_instance(self, attribute: Attribute, cls: Value) -> bool | None:
        """Whether a module is of a class; None if unknown."""


@dataclass(frozen=True)
class EditAt:
    """An edit in place: of the first tensor given to ``self.path``, or of what it returns."""

    path: str
    output: bool


@dataclass
class Trace:
    """One way through ``forward``.

    Attributes:
        returned: what it returns.
        calls: the modules called, in order.
        decisions: the conditions that were not known, and how they were taken.
        residual_used: whether the incoming ``residual`` is read at all.
    """

    returned: Value
    calls: list[Call]
    decisions: dict[str, bool]
    residual_used: bool

    def called(self, path: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self.calls if call.path == path]


def traces(
    subject: Subject,
    *,
    dtype: Any,
    tensor_parallel: int = 1,
    first: bool = False,
    edit: EditAt | None = None,
) -> list[Trace]:
    """Every way through the layer's forward.

    Args:
        subject: the layer.
        dtype: of the model, as a torch dtype.
        tensor_parallel: ranks of a tensor-parallel group.
        first: whether the layer is given no residual, as a model's first one is.
        edit: an edit to follow, as the part `EDIT`.

    Raises:
        NotUnderstood: naming what.
    """
    forward = subject.method("forward")
    if forward is None:
        raise NotUnderstood("its forward has no source")
    waiting: list[dict[str, bool]] = [{}]
    found: list[Trace] = []
    while waiting:
        decisions = waiting.pop()
        run = _Run(subject, dtype, tensor_parallel, first, edit, decisions)
        try:
            found.append(run.trace(forward))
        except _Fork as fork:
            waiting.extend({**decisions, fork.key: choice} for choice in (True, False))
        except _Dead:
            continue
        if len(found) + len(waiting) > _MOST_PATHS:
            raise NotUnderstood("its forward has too many ways")
    if not found:
        raise NotUnderstood("no way through its forward returns")
    return found


def parameters(forward: ast.FunctionDef) -> list[str]:
    """The names of a method's parameters, ``self`` left out."""
    arguments = forward.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)][1:]


@dataclass
class _Run:
    subject: Subject
    dtype: Any
    tensor_parallel: int
    first: bool
    edit: EditAt | None
    decisions: dict[str, bool]
    calls: list[Call] = field(default_factory=list)
    hidden: Flow = field(default_factory=lambda: Flow({HIDDEN: ()}))
    residual: Flow = field(default_factory=lambda: Flow({RESIDUAL: ()}))
    depth: int = 0

    def trace(self, forward: ast.FunctionDef) -> Trace:
        env: dict[str, Value] = {}
        for name in parameters(forward):
            env[name] = Unknown(name)
        if forward.args.kwarg is not None:
            env[forward.args.kwarg.arg] = Mapped()
        env[HIDDEN] = self.hidden
        if RESIDUAL in env:
            env[RESIDUAL] = Known(None) if self.first else self.residual
        returned = self._body(forward.body, env)
        if returned is None:
            raise NotUnderstood("its forward returns nothing")
        used = any(RESIDUAL in parts for call in self.calls for _, parts in call.inputs) or any(
            RESIDUAL in flow.parts for flow in flows_in(returned)
        )
        return Trace(returned, self.calls, self.decisions, used)

    # Statements

    def _body(self, body: Sequence[ast.stmt], env: dict[str, Value]) -> Value | None:
        for statement in body:
            returned = self._statement(statement, env)
            if returned is not None:
                return returned
        return None

    def _statement(self, node: ast.stmt, env: dict[str, Value]) -> Value | None:
        match node:
            case ast.Return():
                return Known(None) if node.value is None else self._value(node.value, env)
            case ast.Assign():
                value = self._value(node.value, env)
                for target in node.targets:
                    self._assign(target, value, env)
            case ast.AnnAssign():
                if node.value is not None:
                    self._assign(node.target, self._value(node.value, env), env)
            case ast.AugAssign():
                self._in_place(node, env)
            case ast.If():
                return self._body(node.body if self._decide(node.test, env) else node.orelse, env)
            case ast.Expr():
                if not isinstance(node.value, ast.Constant):
                    self._value(node.value, env)
            case ast.With():
                return self._body(node.body, env)
            case ast.Raise():
                raise _Dead
            case ast.Assert() | ast.Pass() | ast.Import() | ast.ImportFrom() | ast.Delete():
                pass
            case _:
                raise NotUnderstood(f"{type(node).__name__.lower()} statement in its forward")
        return None

    def _assign(self, target: ast.expr, value: Value, env: dict[str, Value]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for name, part in zip(target.elts, self._apart(value, len(target.elts)), strict=True):
                self._assign(name, part, env)
        elif isinstance(target, ast.Subscript):
            self._assign_item(target, value, env)
        elif isinstance(target, ast.Attribute) and not flows_in(value):
            pass
        else:
            raise NotUnderstood(f"assignment to {ast.unparse(target)}")

    def _assign_item(self, target: ast.Subscript, value: Value, env: dict[str, Value]) -> None:
        owner = self._value(target.value, env)
        if isinstance(owner, Mapped) and isinstance(target.slice, ast.Constant):
            owner.items[str(target.slice.value)] = value
        elif isinstance(owner, Flow):
            _lose(owner, f"assignment to {ast.unparse(target)}")
        else:
            raise NotUnderstood(f"assignment to {ast.unparse(target)}")

    def _apart(self, value: Value, count: int) -> Sequence[Value]:
        if isinstance(value, tuple):
            if len(value) != count:
                raise _Dead
            return value
        if isinstance(value, Flow):
            if value.holds_stream():
                raise _Dead
            return [value, *(Unknown(f"output {i}") for i in range(1, count))]
        if isinstance(value, Unknown):
            return [Unknown(f"{value.text}[{i}]") for i in range(count)]
        raise _Dead

    def _in_place(self, node: ast.AugAssign, env: dict[str, Value]) -> None:
        target, value = self._value(node.target, env), self._value(node.value, env)
        if not isinstance(target, Flow):
            if flows_in(value):
                raise NotUnderstood(f"{ast.unparse(node)}")
            self._assign(node.target, Unknown(ast.unparse(node.target)), env)
        elif isinstance(node.op, ast.Add) and isinstance(value, Flow):
            target.add(value)
        elif isinstance(node.op, ast.Mult | ast.Div) and not isinstance(value, Flow):
            if value not in (Known(1), Known(1.0)):
                target.scale()
        else:
            _lose(target, ast.unparse(node))

    # Conditions

    def _decide(self, test: ast.expr, env: dict[str, Value]) -> bool:
        known = self._truth(test, env)
        if known is not None:
            return known
        key = ast.unparse(test)
        if key not in self.decisions:
            raise _Fork(key)
        return self.decisions[key]

    def _truth(self, test: ast.expr, env: dict[str, Value]) -> bool | None:
        if isinstance(test, ast.BoolOp):
            every = isinstance(test.op, ast.And)
            truths = []
            for operand in test.values:
                truths.append(self._truth(operand, env))
                if truths[-1] is not None and truths[-1] is not every:
                    return not every
            return None if None in truths else every
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._truth(test.operand, env)
            return None if inner is None else not inner
        value = self._value(test, env)
        match value:
            case Known():
                return bool(value.value)
            case Attribute() if value.module is not None:
                return True
            case Mapped():
                return bool(value.items) or None
            case _:
                return None

    def _compare(self, node: ast.Compare, env: dict[str, Value]) -> Value:
        unknown = Unknown(ast.unparse(node))
        if len(node.ops) != 1:
            return unknown
        left = self._value(node.left, env)
        right = self._value(node.comparators[0], env)
        if isinstance(node.ops[0], ast.Is | ast.IsNot) and right == Known(None):
            if isinstance(left, Unknown) or (isinstance(left, Attribute) and left.module is None):
                return unknown
            return Known((left == right) == isinstance(node.ops[0], ast.Is))
        if isinstance(left, Known) and isinstance(right, Known):
            operators: dict[type[ast.cmpop], Any] = {
                ast.Eq: lambda a, b: a == b,
                ast.NotEq: lambda a, b: a != b,
                ast.Gt: lambda a, b: a > b,
                ast.GtE: lambda a, b: a >= b,
                ast.Lt: lambda a, b: a < b,
                ast.LtE: lambda a, b: a <= b,
                ast.In: lambda a, b: a in b,
                ast.NotIn: lambda a, b: a not in b,
                ast.Is: lambda a, b: a is b,
                ast.IsNot: lambda a, b: a is not b,
            }
            found = bool(operators[type(node.ops[0])](left.value, right.value))
            if left.value is self.dtype and found:
                self.decisions[ast.unparse(node)] = True  # a way that other types do not go
            return Known(found)
        return unknown

    # Expressions

    def _value(self, node: ast.expr, env: dict[str, Value]) -> Value:
        match node:
            case ast.Constant():
                return Known(node.value)
            case ast.Name():
                if node.id == "self":
                    return Attribute("")
                return env[node.id] if node.id in env else self.subject.outside(node.id)
            case ast.Attribute():
                return self._attribute(node, env)
            case ast.Tuple() | ast.List():
                return tuple(self._value(element, env) for element in node.elts)
            case ast.Dict():
                return self._dictionary(node, env)
            case ast.Subscript():
                return self._item(node, env)
            case ast.BinOp():
                return self._operation(node, env)
            case ast.Call():
                return self._call(node, env)
            case ast.Compare():
                return self._compare(node, env)
            case ast.BoolOp():
                truth = self._truth(node, env)
                return Unknown(ast.unparse(node)) if truth is None else Known(truth)
            case ast.UnaryOp():
                return self._unary(node, env)
            case ast.IfExp():
                return self._value(node.body if self._decide(node.test, env) else node.orelse, env)
            case ast.JoinedStr() | ast.Lambda() | ast.Slice():
                return Unknown(ast.unparse(node))
            case ast.NamedExpr():
                value = self._value(node.value, env)
                env[node.target.id] = value
                return value
            case _:
                raise NotUnderstood(f"{ast.unparse(node)} in its forward")

    def _unary(self, node: ast.UnaryOp, env: dict[str, Value]) -> Value:
        if isinstance(node.op, ast.Not):
            truth = self._truth(node, env)
            return Unknown(ast.unparse(node)) if truth is None else Known(truth)
        value = self._value(node.operand, env)
        if isinstance(value, Flow):
            negative = value.copy()
            negative.scale()
            return negative
        if isinstance(value, Known) and isinstance(node.op, ast.USub):
            return Known(-value.value)
        return Unknown(ast.unparse(node))

    def _dictionary(self, node: ast.Dict, env: dict[str, Value]) -> Value:
        items: dict[str, Value] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant):
                raise NotUnderstood(ast.unparse(node))
            items[str(key.value)] = self._value(value, env)
        return Mapped(items)

    def _attribute(self, node: ast.Attribute, env: dict[str, Value]) -> Value:
        owner = self._value(node.value, env)
        match owner:
            case Attribute():
                path = f"{owner.path}.{node.attr}".lstrip(".")
                found = self.subject.attribute(path)
                if isinstance(found, Unknown) and (
                    owner.path or self.subject.method(node.attr) is not None
                ):
                    return Method(owner, node.attr)
                return found
            case Flow():
                return Known(self.dtype) if node.attr == "dtype" else Unknown(ast.unparse(node))
            case Known():
                try:
                    return Known(getattr(owner.value, node.attr))
                except AttributeError:
                    return Unknown(ast.unparse(node))
            case Function():
                value = getattr(owner.value, node.attr, None)
                if value is None or callable(value):
                    return Function(node.attr, value)
                return value if isinstance(value, Function) else Known(value)
            case _:
                return Unknown(ast.unparse(node))

    def _item(self, node: ast.Subscript, env: dict[str, Value]) -> Value:
        owner = self._value(node.value, env)
        index = self._value(node.slice, env)
        match owner:
            case tuple() if isinstance(index, Known) and isinstance(index.value, int):
                if not -len(owner) <= index.value < len(owner):
                    raise _Dead
                item: Value = owner[index.value]
                return item
            case Mapped() if isinstance(index, Known):
                return owner.items.get(str(index.value), Unknown(ast.unparse(node)))
            case Attribute() if isinstance(index, Known) and isinstance(index.value, int):
                return self.subject.attribute(f"{owner.path}.{index.value}")
            case Flow():
                if index == Known(0) and not owner.holds_stream():
                    return owner  # a module's output that is a tuple
                part = owner.copy()
                _lose(part, ast.unparse(node))
                return part
            case Known() if isinstance(index, Known):
                return Known(owner.value[index.value])
            case _:
                return Unknown(ast.unparse(node))

    def _operation(self, node: ast.BinOp, env: dict[str, Value]) -> Value:
        left, right = self._value(node.left, env), self._value(node.right, env)
        text = ast.unparse(node)
        if isinstance(node.op, ast.Add) and isinstance(left, Flow) and isinstance(right, Flow):
            total = left.copy()
            total.add(right)
            return total
        tensors = [value for value in (left, right) if isinstance(value, Flow)]
        if len(tensors) == 1 and isinstance(node.op, ast.Mult | ast.Div):
            other = right if left is tensors[0] else left
            scaled = tensors[0].copy()
            # One times is none; the number one over a tensor is not looked for.
            if other not in (Known(1), Known(1.0)):
                scaled.scale()
            return scaled
        if tensors:
            result = Flow()
            for tensor in tensors:
                result.add(tensor)
            _lose(result, text)
            return result
        return _number(node.op, left, right) or Unknown(text)

    # Calls

    def _call(self, node: ast.Call, env: dict[str, Value]) -> Value:
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            return self._is_instance(node, env)
        function = self._value(node.func, env)
        args: list[tuple[int | str, Value]] = []
        for i, arg in enumerate(node.args):
            if isinstance(arg, ast.Starred):
                value = self._value(arg.value, env)
                if flows_in(value):
                    raise NotUnderstood(ast.unparse(node))
                continue
            args.append((i, self._value(arg, env)))
        for keyword in node.keywords:
            value = self._value(keyword.value, env)
            if keyword.arg is not None:
                args.append((keyword.arg, value))
            elif isinstance(value, Mapped):
                args.extend(value.items.items())
        match function:
            case Attribute():
                return self._module(function, args, forward=True)
            case Method() if not function.owner.path:
                return self._own_method(function.name, args)
            case Method():
                if function.owner.norm is None and not flows_in([v for _, v in args]):
                    return Unknown(ast.unparse(node))
                return self._module(function.owner, args, forward=function.name == "forward")
            case Function():
                return self._function(function, args, ast.unparse(node))
        if isinstance(node.func, ast.Attribute):
            owner = self._value(node.func.value, env)
            if isinstance(owner, Flow):
                return self._tensor_method(owner, node.func.attr, args, ast.unparse(node))
        return self._function(Function(ast.unparse(node.func)), args, ast.unparse(node))

    def _is_instance(self, node: ast.Call, env: dict[str, Value]) -> Value:
        subject, cls = (self._value(arg, env) for arg in node.args)
        found = None
        if isinstance(subject, Attribute):
            found = self.subject.is_instance(subject, cls)
        elif isinstance(subject, Known) and isinstance(cls, Function | Known):
            found = isinstance(cls.value, type) and isinstance(subject.value, cls.value)
        return Unknown(ast.unparse(node)) if found is None else Known(found)

    def _module(
        self, module: Attribute, args: Sequence[tuple[int | str, Value]], *, forward: bool
    ) -> Value:
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
        part = f"{module.path}#{len(self.calls)}"
        norm = module.norm
        if norm is not None and len(tensors) < 2:
            norm = "one"
        self.calls.append(Call(module.path, part, forward, norm, inputs, bool(buffers)))
        made = Flow({part: ()})
        if edited is not None and edited.output:
            made.parts[EDIT] = ()
        if norm in ("adds", "passes", "unknown"):
            return self._norm_of_two(norm, made, tensors)
        for buffer in buffers:
            buffer.parts = dict(made.parts)
        # A norm that may be given a residual, and is not, returns what one of its kind returns.
        if norm == "one" and module.norm == "passes":
            return (made, Known(None))
        return made

    def _norm_of_two(
        self, norm: str, made: Flow, tensors: Sequence[tuple[int | str, Flow]]
    ) -> Value:
        if len(tensors) != 2 or norm == "unknown":
            raise NotUnderstood("it has a norm of several tensors that is not known")
        (_, first), (_, second) = tensors
        if norm == "passes":
            return (made, second)
        total = first.copy()
        total.add(second)
        return (made, total)

    def _own_method(self, name: str, args: Sequence[tuple[int | str, Value]]) -> Value:
        method = self.subject.method(name)
        if method is None or self.depth >= _DEEPEST_CALL:
            raise NotUnderstood(f"self.{name}")
        if not flows_in([value for _, value in args]):
            return Unknown(f"self.{name}()")
        names = parameters(method)
        env: dict[str, Value] = {parameter: Unknown(parameter) for parameter in names}
        if method.args.kwarg is not None:
            env[method.args.kwarg.arg] = Mapped()
        for key, value in args:
            if isinstance(key, int) and key >= len(names):
                raise NotUnderstood(f"self.{name} is given more than it takes")
            env[names[key] if isinstance(key, int) else key] = value
        self.depth += 1
        try:
            returned = self._body(method.body, env)
        finally:
            self.depth -= 1
        return Known(None) if returned is None else returned

    def _function(
        self, function: Function, args: Sequence[tuple[int | str, Value]], text: str
    ) -> Value:
        values = [value for _, value in args]
        flows = flows_in(values)
        if function.name in _ADDING_FUNCTIONS and len(values) == 3:
            norm = values[2]
            if isinstance(norm, Attribute):
                # The sum is the norm's, but no module is called.
                return self._module(
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
        _lose(result, text)
        return result

    def _tensor_method(
        self, owner: Flow, name: str, args: Sequence[tuple[int | str, Value]], text: str
    ) -> Value:
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
                _lose(owner, text)
            return owner
        result = owner.copy()
        for other in others:
            result.add(other)
        _lose(result, text)
        return result


def _lose(flow: Flow, text: str) -> None:
    """Something unknown was made of a tensor: what it holds of the stream cannot be told."""
    flow.parts = {f"{text} of {part}": factors for part, factors in flow.parts.items()}


def _number(operator: ast.operator, left: Value, right: Value) -> Value | None:
    if not isinstance(left, Known) or not isinstance(right, Known):
        return None
    try:
        match operator:
            case ast.Add():
                return Known(left.value + right.value)
            case ast.Sub():
                return Known(left.value - right.value)
            case ast.Mult():
                return Known(left.value * right.value)
            case ast.Div():
                return Known(left.value / right.value)
            case ast.Mod():
                return Known(left.value % right.value)
            case ast.FloorDiv():
                return Known(left.value // right.value)
    except (TypeError, ZeroDivisionError):
        return None
    return None


def _computed(function: Function, values: Sequence[Value]) -> Value | None:
    if function.value in (math.sqrt, len, int, float, bool) and all(
        isinstance(value, Known) for value in values
    ):
        return Known(function.value(*(value.value for value in values)))  # type: ignore[union-attr]
    return None


def summary(parts: Mapping[str, Any]) -> str:
    """Parts of a sum in words, for a refusal."""
    return " + ".join(part.split("#")[0] for part in parts) or "nothing"
