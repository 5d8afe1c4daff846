"""Imports point one way, and what is said to be torch-free or vLLM-free is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(file: Path) -> set[str]:
    """Top-level names and dotted modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("sae", ("steering", "server", "vllm")), ("steering", ("server",))],
)
def test_imports_point_from_server_to_steering_to_sae(
    package: str, forbidden: tuple[str, ...]
) -> None:
    for file in files(package):
        tops = {name.split(".")[0] for name in imported(file)}
        assert not tops & set(forbidden), file


def test_only_the_vllm_folder_of_steering_imports_vllm() -> None:
    for file in files("steering"):
        if "vllm" not in file.relative_to(ROOT / "steering").parts:
            assert "vllm" not in {name.split(".")[0] for name in imported(file)}, file


@pytest.mark.parametrize(
    "module", ["sae.card", "sae.source", "steering.request.spec", "steering.request.plan"]
)
def test_what_the_front_end_shares_needs_neither_torch_nor_vllm(module: str) -> None:
    code = f"import {module}, sys; print(sorted({{'torch', 'vllm'}} & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert out.stdout.strip() == "[]", out.stderr


def test_what_runs_beside_the_model_parses_no_request() -> None:
    parsing = {f"steering.request.{name}" for name in ("spec", "parse", "shape", "catalog")}
    for file in files("steering/worker"):
        assert not parsing & imported(file), file


#: The files of `server/` that know vLLM; the rest is HTTP.
SERVER_FILES_ON_VLLM = {
    "allow_list.py",
    "commands/inspect_sae.py",
    "commands/run_batch.py",
    "commands/serve.py",
    "commands/study.py",
    "presets/models.py",
    "protocol.py",
    "rendering.py",
    "routes/generate.py",
    "routes/studies.py",
    "self_check.py",
    "start/arguments.py",
    "start/cpu_memory.py",
    "start/engine.py",
    "study_stream.py",
}


def test_only_the_named_files_of_the_server_import_vllm() -> None:
    found = {
        file.relative_to(ROOT / "server").as_posix()
        for file in files("server")
        if "vllm" in {name.split(".")[0] for name in imported(file)}
    }
    assert found == SERVER_FILES_ON_VLLM


def test_no_test_module_imports_another() -> None:
    for file in files("tests"):
        for name in imported(file):
            module = name.rsplit(".", 1)[-1]
            assert not (name.startswith("tests.") and module.startswith("test_")), (file, name)
