"""Checks the source text of a vLLM for what this project relies on.

Nothing of it is imported or run, so any unpacked wheel can be checked, on any machine.
"""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Seam:
    """Something in vLLM that this project imports, calls, wraps or reads.

    Attributes:
        module: dotted name below ``vllm``.
        name: name of a function, class, method or variable there; empty for the module itself.
        first: a function's leading parameters in this order, without ``self``: those that are
            passed or taken by position.
        parameters: parameters that are passed by name.
        fields: attributes of a class, its own or inherited, set in its body or on ``self``.
        mentions: names that its source must mention, such as calls through which a wrapper is
            reached.
        or_in: another module, which has it in another version.
    """

    module: str
    name: str
    first: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    or_in: str | None = None


class Source:
    """The source text of one vLLM.

    Args:
        package: the folder ``vllm`` of an installation or of an unpacked wheel.
    """

    def __init__(self, package: Path) -> None:
        self._package = package
        self._trees: dict[str, ast.Module | None] = {}

    @property
    def version(self) -> str:
        """The version that the package states, or ``of unknown version``."""
        try:
            text = (self._package / "_version.py").read_text(encoding="utf-8")
        except OSError:
            text = ""
        found = re.search(r"""\bversion = ['"]([^'"]+)""", text)
        return found.group(1) if found else "of unknown version"

    def definition(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module where a name of ``module`` is defined, and its node; follows re-exports."""
        return self._find(module, name)

    def line(self, module: str, name: str) -> list[tuple[str, ast.ClassDef]]:
        """A class and the classes of this package that it inherits from, nearest first.

        Each comes with the module that defines it; the list is empty if there is no such class.
        """
        found = self._find(module, name)
        return [] if found is None else list(self._line(*found))

    def lacking(self, seams: Mapping[str, Iterable[Seam]]) -> list[str]:
        """What is missing of the seams, each in a few words.

        Args:
            seams: by the module of this project that relies on them.
        """
        with _no_collection():
            return [
                f"{what} (needed by {ours})"
                for ours, theirs in seams.items()
                for seam in theirs
                for what in self._lacking(seam)
            ]

    def _lacking(self, seam: Seam) -> Iterable[str]:
        where = f"vllm.{seam.module}".rstrip(".")
        found = self._find(seam.module, seam.name)
        if found is None and seam.or_in is not None:
            found = self._find(seam.or_in, seam.name)
        if found is None:
            yield f"no {seam.name} in {where}" if seam.name else f"no module {where}"
            return
        module, node = found
        whole = f"{where}.{seam.name}".rstrip(".")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _lacking_parameters(seam, whole, node)
        if seam.fields:
            have = self._fields(module, node)
            yield from (f"{whole} has no {name!r}" for name in seam.fields if name not in have)
        if seam.mentions:
            mentioned = _mentioned(node)
            yield from (
                f"{whole} no longer mentions {name!r}"
                for name in seam.mentions
                if name not in mentioned
            )

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            path = self._package.joinpath(*module.split(".")) if module else self._package
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            try:
                self._trees[module] = ast.parse(file.read_bytes())
            except (OSError, SyntaxError):
                self._trees[module] = None
        return self._trees[module]

    def _find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module that defines a dotted name, and its node; follows re-exports and bases."""
        tree = self._tree(module)
        if tree is None or not name:
            return None if tree is None else (module, tree)
        head, _, rest = name.partition(".")
        found = self._top_level(module, tree, head)
        if found is None or not rest:
            return found
        for owner, cls in self._line(*found):
            for member in cls.body:
                if getattr(member, "name", None) == rest:
                    return owner, member
        return None

    def _top_level(self, module: str, tree: ast.Module, name: str) -> tuple[str, ast.AST] | None:
        for node in _statements(tree.body, into_definitions=False):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(module, node, alias.name)
            elif name in _defined(node):
                return module, node
        below = f"{module}.{name}".lstrip(".")
        submodule = self._tree(below)
        return None if submodule is None else (below, submodule)

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> tuple[str, ast.AST] | None:
        target = (node.module or "").split(".")
        if node.level:
            path = self._package.joinpath(*module.split(".")) if module else self._package
            parts = module.split(".") if module else []
            keep = len(parts) - node.level + path.is_dir()
            target = parts[:keep] + (target if node.module else [])
        elif target[0] == "vllm":
            target = target[1:]
        else:
            return module, node  # from another package, which is not searched
        return self._find(".".join(target), name)

    def _line(self, module: str, node: ast.AST) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and the classes of vLLM that it inherits from, nearest first."""
        if not isinstance(node, ast.ClassDef):
            return
        yield module, node
        for base in node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name) and (found := self._find(module, plain.id)):
                yield from self._line(*found)

    def _fields(self, module: str, node: ast.AST) -> set[str]:
        names: set[str] = set()
        for _, cls in self._line(module, node):
            for part in _statements(cls.body, into_definitions=False):
                names.update(_defined(part))
            for part in _statements(cls.body, into_definitions=True):
                names.update(_set_on_self(part))
        return names


def _lacking_parameters(
    seam: Seam, whole: str, node: ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterable[str]:
    by_position = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
    if by_position[:1] in (["self"], ["cls"]):
        del by_position[0]
    if tuple(by_position[: len(seam.first)]) != seam.first:
        yield f"{whole} takes ({', '.join(by_position)}), not ({', '.join(seam.first)}) first"
    names = {*by_position, *(arg.arg for arg in node.args.kwonlyargs)}
    yield from (
        f"{whole} has no parameter {name!r}" for name in seam.parameters if name not in names
    )


def _statements(body: Iterable[ast.stmt], *, into_definitions: bool) -> Iterator[ast.stmt]:
    """All statements, including those under ``if``, ``with``, ``try`` and loops."""
    for node in body:
        yield node
        if into_definitions or not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ):
            for block in ("body", "orelse", "finalbody", "handlers", "cases"):
                for part in getattr(node, block, ()):
                    nested = (part,) if isinstance(part, ast.stmt) else part.body
                    yield from _statements(nested, into_definitions=into_definitions)


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines where it stands."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    return [target.id for target in _targets(node) if isinstance(target, ast.Name)]


def _set_on_self(node: ast.stmt) -> list[str]:
    """The attributes that a statement sets on ``self``."""
    return [
        target.attr
        for target in _targets(node)
        if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == "self"
    ]


def _targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.AnnAssign):
        return [node.target]
    if not isinstance(node, ast.Assign):
        return []
    return [leaf for target in node.targets for leaf in getattr(target, "elts", [target])]


def _mentioned(node: ast.AST) -> set[str]:
    """All names, attributes, arguments and strings in a node; comments do not count."""
    found: set[str] = set()
    waiting: list[Any] = [node]
    while waiting:  # `ast.walk` takes three times as long
        for value in vars(waiting.pop()).values():
            if isinstance(value, str):
                found.add(value)
            elif isinstance(value, ast.AST):
                waiting.append(value)
            elif isinstance(value, list):
                waiting.extend(part for part in value if isinstance(part, ast.AST))
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector: syntax trees are a million objects, none of which is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
