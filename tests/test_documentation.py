"""What documentation names is there: files, objects, error codes, flags and series."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from server.metrics import PRESET_REQUESTS, REJECTED, REQUESTS, WORKER_SERIES
from server.start.flags import ServerOptions
from steering.errors import ErrorCode

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(path for folder in ("sae", "server", "steering") for path in (ROOT / folder).rglob("*.md")),
    *(ROOT / "deploy").glob("*.md"),
    *(ROOT / "tests" / "engine").glob("*.md"),
]
SOURCES = [
    path for folder in ("sae", "server", "steering") for path in (ROOT / folder).rglob("*.py")
]
STUDIO = list((ROOT / "server" / "studio").iterdir())
#: Names like those of this project's objects that are another library's.
FOREIGN = {"SAE.load_from_disk"}

#: `steering.` and another word is a path into the field, not a module.
STEERING = {f"steering.{path.stem}" for path in (ROOT / "steering").iterdir()}

_CODE = re.compile(r"```.*?```", re.DOTALL)
_NAME = re.compile(r"``?([\w.]+(?:\(\))?)``?")


def named(text: str) -> set[str]:
    """The dotted names that a text has in backticks, outside of its blocks of code."""
    return {name.removesuffix("()") for name in _NAME.findall(_CODE.sub("", text))}


def documentation(source: Path) -> str:
    """The docstrings and comments of a module."""
    text = source.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (
        node for node in ast.walk(modules()[module_name(source)]) if isinstance(node, documented)
    )
    docstrings = [ast.get_docstring(node) or "" for node in nodes]
    return "\n".join([*docstrings, *re.findall(r"^\s*#.*$", text, re.MULTILINE)])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, ast.Module]:
    """The project's modules by their dotted names."""
    return {
        module_name(path): ast.parse(path.read_text(encoding="utf-8"))
        for package in ("sae", "server", "steering", "tests")
        for path in (ROOT / package).rglob("*.py")
    }


@cache
def classes() -> dict[str, list[ast.ClassDef]]:
    """The project's classes by their names."""
    found: dict[str, list[ast.ClassDef]] = {}
    for module in modules().values():
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """The names that a module's or a class's statements bind."""
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield statement.name
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name for alias in statement.names)
            case ast.If():
                yield from defined(statement.body)
            case ast.Assign() | ast.AnnAssign():
                targets = ast.walk(ast.Module([statement], []))
                yield from (
                    node.id
                    for node in targets
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                )


def has_attribute(cls: ast.ClassDef, name: str) -> bool:
    """Whether instances of a class have an attribute; any, if it inherits from foreign classes."""
    if name in defined(cls.body):
        return True
    for node in ast.walk(cls):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and node.attr == name
        ):
            return True
    bases = [base.id if isinstance(base, ast.Name) else "" for base in cls.bases]
    return any(
        base not in classes() or any(has_attribute(known, name) for known in classes()[base])
        for base in bases
    )


def is_there(name: str) -> bool:
    """Whether a dotted name leads to something; true for names that are not this project's."""
    first, *rest = parts = name.split(".")
    if first in ("sae", "server", "tests") or ".".join(parts[:2]) in STEERING:
        end = max(i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) in modules())
        return end == len(parts) or (
            parts[end] in defined(modules()[".".join(parts[:end])].body)
            and (end + 1 == len(parts) or is_there(".".join(parts[end:])))
        )
    if len(parts) == 2 and first in classes():
        return any(has_attribute(cls, rest[0]) for cls in classes()[first])
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    named_files = set(re.findall(r"`([\w./-]+\.(?:py|js|sh))(?:::\w+)?`", text))
    anywhere = {path.name for path in (*SOURCES, *STUDIO, *(ROOT / "tests").rglob("*.py"))}
    lost = {
        file
        for file in named_files
        if not (page.parent / file).exists() and not (ROOT / file).exists() and file not in anywhere
    }
    assert not lost


def test_objects_that_documentation_names_are_there() -> None:
    lost = {
        (str(path.relative_to(ROOT)), name)
        for path in (*PAGES, *SOURCES)
        for name in named(
            documentation(path) if path.suffix == ".py" else path.read_text(encoding="utf-8")
        )
        if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name)
        and not name.endswith((".py", ".safetensors"))
        and name not in FOREIGN
        and not is_there(name)
    }
    assert not lost


def test_every_error_code_is_in_the_servers_table_once() -> None:
    page = (ROOT / "server" / "README.md").read_text(encoding="utf-8")
    table = page.partition("## Errors")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(get_args(ErrorCode))


def test_every_flag_is_on_the_servers_page_and_no_other_is_anywhere() -> None:
    flags = {each.metadata["name"] for each in fields(ServerOptions)}
    page = (ROOT / "server" / "README.md").read_text(encoding="utf-8")
    pattern = re.compile(r"--(?:no-)?(steering-[a-z-]+[a-z])")
    assert flags <= {f"--{name}" for name in pattern.findall(page)} | {"--sae"}
    for path in PAGES:
        assert {f"--{name}" for name in pattern.findall(path.read_text(encoding="utf-8"))} <= flags


def test_every_series_is_in_the_table_of_the_deployment_page() -> None:
    page = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    table = page.partition("## Watching")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `steering_")]
    series = (REQUESTS, PRESET_REQUESTS, REJECTED, *WORKER_SERIES.values())
    # A counter's samples are named with _total behind the name of the series.
    names = {f"{each._name}{'_total' if each._type == 'counter' else ''}" for each in series}
    assert set(re.findall(r"`(steering_\w+)", "".join(rows))) == names
