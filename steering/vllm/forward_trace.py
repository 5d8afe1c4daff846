"""Follows a layer's ``forward`` by its syntax tree and tells what it makes of the stream.

Nothing is run. Conditions that the layer's attributes decide are decided; at other conditions both
ways are followed. What is not understood raises `NotUnderstood` and never passes for something
else. This file follows statements, `traced_expressions` the expressions in them, and `traced_calls`
the calls.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from steering.vllm.flows import (
    HIDDEN,
    RESIDUAL,
    Call,
    Flow,
    Known,
    Mapped,
    Unknown,
    Value,
    flows_in,
)
from steering.vllm.traced_calls import Calls, EditAt, NotUnderstood, lose
from steering.vllm.traced_expressions import Dead, Expressions, Fork, Subject

__all__ = ["EditAt", "NotUnderstood", "Subject", "Trace", "parameters", "summary", "traces"]

_MOST_PATHS: Final = 256
_DEEPEST_CALL: Final = 4


@dataclass
class Trace:
    """One way through ``forward``.

    Attributes:
        returned: what it returns.
        calls: the modules called, in order.
        decisions: the conditions that were not known, and which way was taken at each.
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
        dtype: torch dtype of the model.
        tensor_parallel: how many ranks a tensor-parallel group has.
        first: whether the layer is given no residual, like the first layer of a model.
        edit: an edit to follow, as the part `EDIT`.

    Raises:
        NotUnderstood: if the code does something that the tracer does not know; it says what.
    """
    forward = subject.method("forward")
    if forward is None:
        raise NotUnderstood("its forward has no source")
    waiting: list[dict[str, bool]] = [{}]
    found: list[Trace] = []
    while waiting:
        decisions = waiting.pop()
        run = _Run(subject, dtype, decisions, Calls(tensor_parallel, edit), first)
        try:
            found.append(run.trace(forward))
        except Fork as fork:
            waiting.extend({**decisions, fork.key: choice} for choice in (True, False))
        except Dead:
            continue
        if len(found) + len(waiting) > _MOST_PATHS:
            raise NotUnderstood(f"there are more than {_MOST_PATHS} ways through its forward")
    if not found:
        raise NotUnderstood("no way through its forward returns")
    return found


def parameters(forward: ast.FunctionDef) -> list[str]:
    """The names of a method's parameters, without ``self``."""
    arguments = forward.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)][1:]


@dataclass
class _Run(Expressions):
    """One way through the code, statement by statement.

    Attributes:
        first: whether the layer is given no residual.
        hidden: the stream that comes in.
        residual: the residual that comes in.
        depth: how many methods of the layer are being followed, one inside the other.
    """

    first: bool
    hidden: Flow = field(default_factory=lambda: Flow({HIDDEN: ()}))
    residual: Flow = field(default_factory=lambda: Flow({RESIDUAL: ()}))
    depth: int = 0

    def trace(self, forward: ast.FunctionDef) -> Trace:
        """Follow the layer's forward to where it returns."""
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
        used = any(
            RESIDUAL in parts for call in self.calls.made for _, parts in call.inputs
        ) or any(RESIDUAL in flow.parts for flow in flows_in(returned))
        return Trace(returned, self.calls.made, self.decisions, used)

    def _body(self, body: Sequence[ast.stmt], env: dict[str, Value]) -> Value | None:
        for statement in body:
            returned = self._statement(statement, env)
            if returned is not None:
                return returned
        return None

    def _statement(self, node: ast.stmt, env: dict[str, Value]) -> Value | None:
        match node:
            case ast.Return():
                return Known(None) if node.value is None else self.value(node.value, env)
            case ast.Assign():
                value = self.value(node.value, env)
                for target in node.targets:
                    self._assign(target, value, env)
            case ast.AnnAssign():
                if node.value is not None:
                    self._assign(node.target, self.value(node.value, env), env)
            case ast.AugAssign():
                self._in_place(node, env)
            case ast.If():
                return self._body(node.body if self.decide(node.test, env) else node.orelse, env)
            case ast.Expr():
                if not isinstance(node.value, ast.Constant):
                    self.value(node.value, env)
            case ast.With():
                return self._body(node.body, env)
            case ast.Raise():
                raise Dead
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
        owner = self.value(target.value, env)
        if isinstance(owner, Mapped) and isinstance(target.slice, ast.Constant):
            owner.items[str(target.slice.value)] = value
        elif isinstance(owner, Flow):
            lose(owner, f"assignment to {ast.unparse(target)}")
        else:
            raise NotUnderstood(f"assignment to {ast.unparse(target)}")

    def _apart(self, value: Value, count: int) -> Sequence[Value]:
        if isinstance(value, tuple):
            if len(value) != count:
                raise Dead
            return value
        if isinstance(value, Flow):
            if value.holds_stream():
                raise Dead
            return [value, *(Unknown(f"output {i}") for i in range(1, count))]
        if isinstance(value, Unknown):
            return [Unknown(f"{value.text}[{i}]") for i in range(count)]
        raise Dead

    def _in_place(self, node: ast.AugAssign, env: dict[str, Value]) -> None:
        target, value = self.value(node.target, env), self.value(node.value, env)
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
            lose(target, ast.unparse(node))

    def own_method(self, name: str, args: Sequence[tuple[int | str, Value]]) -> Value:
        """See `Expressions.own_method`; the method's statements are followed."""
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
                raise NotUnderstood(f"self.{name} is given more arguments than it takes")
            env[names[key] if isinstance(key, int) else key] = value
        self.depth += 1
        try:
            returned = self._body(method.body, env)
        finally:
            self.depth -= 1
        return Known(None) if returned is None else returned


def summary(parts: Mapping[str, Any]) -> str:
    """Parts of a sum in words, for a refusal."""
    return " + ".join(part.split("#")[0] for part in parts) or "nothing"
