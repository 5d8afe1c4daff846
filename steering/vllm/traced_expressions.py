"""What the value of an expression in a layer's ``forward`` is, and whether a condition holds."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steering.vllm.flows import (
    Attribute,
    Flow,
    Function,
    Known,
    Mapped,
    Method,
    Unknown,
    Value,
    flows_in,
)
from steering.vllm.traced_calls import Calls, NotUnderstood, lose


class Dead(Exception):
    """This way through the code raises an exception or is impossible."""


class Fork(Exception):
    """A condition that is not known, so that both ways must be followed; ``key`` is its source."""

    def __init__(self, key: str) -> None:
        self.key = key


class Subject(Protocol):
    """A layer whose code is followed: a loaded one, or only the source text of its class."""

    def method(self, name: str) -> ast.FunctionDef | None:
        """A method of its class; None if there is none."""

    def attribute(self, path: str) -> Value:
        """``self.path``, for a dotted path; `Unknown` if the source does not say what it is."""

    def outside(self, name: str) -> Value:
        """A global name of the class's module."""

    def is_instance(self, attribute: Attribute, cls: Value) -> bool | None:
        """Whether a module is of a class; None if that is not known."""


@dataclass
class Expressions(ABC):
    """The expressions of one way through the code.

    Attributes:
        subject: the layer.
        dtype: torch dtype of the model.
        decisions: which way is taken at each condition that is not known, by its source.
        calls: what the expressions call.
    """

    subject: Subject
    dtype: Any
    decisions: dict[str, bool]
    calls: Calls

    @abstractmethod
    def own_method(self, name: str, args: Sequence[tuple[int | str, Value]]) -> Value:
        """What a method of the layer itself returns."""

    def decide(self, test: ast.expr, env: dict[str, Value]) -> bool:
        """Whether a condition holds.

        Raises:
            Fork: if it is neither known nor decided.
        """
        known = self._truth(test, env)
        if known is not None:
            return known
        key = ast.unparse(test)
        if key not in self.decisions:
            raise Fork(key)
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
        value = self.value(test, env)
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
        left = self.value(node.left, env)
        right = self.value(node.comparators[0], env)
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
                self.decisions[ast.unparse(node)] = True  # other dtypes do not take this way
            return Known(found)
        return unknown

    def value(self, node: ast.expr, env: dict[str, Value]) -> Value:
        """The value of an expression.

        Args:
            node: the expression.
            env: the values of names.

        Raises:
            NotUnderstood: if the expression is not understood; it says which part.
            Dead: if this way through the code is impossible.
            Fork: if it depends on a condition that is neither known nor decided.
        """
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
                return tuple(self.value(element, env) for element in node.elts)
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
                return self.value(node.body if self.decide(node.test, env) else node.orelse, env)
            case ast.JoinedStr() | ast.Lambda() | ast.Slice():
                return Unknown(ast.unparse(node))
            case ast.NamedExpr():
                value = self.value(node.value, env)
                env[node.target.id] = value
                return value
            case _:
                raise NotUnderstood(f"{ast.unparse(node)} in its forward")

    def _unary(self, node: ast.UnaryOp, env: dict[str, Value]) -> Value:
        if isinstance(node.op, ast.Not):
            truth = self._truth(node, env)
            return Unknown(ast.unparse(node)) if truth is None else Known(truth)
        value = self.value(node.operand, env)
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
            items[str(key.value)] = self.value(value, env)
        return Mapped(items)

    def _attribute(self, node: ast.Attribute, env: dict[str, Value]) -> Value:
        owner = self.value(node.value, env)
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
        owner = self.value(node.value, env)
        index = self.value(node.slice, env)
        match owner:
            case tuple() if isinstance(index, Known) and isinstance(index.value, int):
                if not -len(owner) <= index.value < len(owner):
                    raise Dead
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
                lose(part, ast.unparse(node))
                return part
            case Known() if isinstance(index, Known):
                return Known(owner.value[index.value])
            case _:
                return Unknown(ast.unparse(node))

    def _operation(self, node: ast.BinOp, env: dict[str, Value]) -> Value:
        left, right = self.value(node.left, env), self.value(node.right, env)
        text = ast.unparse(node)
        if isinstance(node.op, ast.Add) and isinstance(left, Flow) and isinstance(right, Flow):
            total = left.copy()
            total.add(right)
            return total
        tensors = [value for value in (left, right) if isinstance(value, Flow)]
        if len(tensors) == 1 and isinstance(node.op, ast.Mult | ast.Div):
            other = right if left is tensors[0] else left
            scaled = tensors[0].copy()
            # Times one changes nothing. One divided by a tensor is not told apart from that.
            if other not in (Known(1), Known(1.0)):
                scaled.scale()
            return scaled
        if tensors:
            result = Flow()
            for tensor in tensors:
                result.add(tensor)
            lose(result, text)
            return result
        return _number(node.op, left, right) or Unknown(text)

    def _call(self, node: ast.Call, env: dict[str, Value]) -> Value:
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            return self._is_instance(node, env)
        function = self.value(node.func, env)
        args: list[tuple[int | str, Value]] = []
        for i, arg in enumerate(node.args):
            if isinstance(arg, ast.Starred):
                value = self.value(arg.value, env)
                if flows_in(value):
                    raise NotUnderstood(ast.unparse(node))
                continue
            args.append((i, self.value(arg, env)))
        for keyword in node.keywords:
            value = self.value(keyword.value, env)
            if keyword.arg is not None:
                args.append((keyword.arg, value))
            elif isinstance(value, Mapped):
                args.extend(value.items.items())
        match function:
            case Attribute():
                return self.calls.module(function, args, forward=True)
            case Method() if not function.owner.path:
                return self.own_method(function.name, args)
            case Method():
                if function.owner.norm is None and not flows_in([v for _, v in args]):
                    return Unknown(ast.unparse(node))
                return self.calls.module(function.owner, args, forward=function.name == "forward")
            case Function():
                return self.calls.function(function, args, ast.unparse(node))
        if isinstance(node.func, ast.Attribute):
            owner = self.value(node.func.value, env)
            if isinstance(owner, Flow):
                return self.calls.tensor_method(owner, node.func.attr, args, ast.unparse(node))
        return self.calls.function(Function(ast.unparse(node.func)), args, ast.unparse(node))

    def _is_instance(self, node: ast.Call, env: dict[str, Value]) -> Value:
        subject, cls = (self.value(arg, env) for arg in node.args)
        found = None
        if isinstance(subject, Attribute):
            found = self.subject.is_instance(subject, cls)
        elif isinstance(subject, Known) and isinstance(cls, Function | Known):
            found = isinstance(cls.value, type) and isinstance(subject.value, cls.value)
        return Unknown(ast.unparse(node)) if found is None else Known(found)


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
