"""The list of what is leant on in vLLM: it holds of the installed one, is whole, and is heeded."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server import seams as of_server
from steering.vllm import seams as of_steering
from steering.vllm.source import Source

ROOT = Path(__file__).parents[2]
SEAMS = of_steering.SEAMS | of_server.SEAMS

spec = importlib.util.find_spec("vllm")
assert spec is not None and spec.origin is not None
INSTALLED = Path(spec.origin).parent

#: The module that is changed, what in it, and the line that says so.
CHANGES = {
    "a renamed parameter": (
        "v1/worker/gpu_model_runner.py",
        ("force_eager: bool", "eager: bool"),
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner._determine_batch_execution_and_padding "
        "has no parameter 'force_eager' (needed by steering/vllm/runner_v1.py)",
    ),
    "a parameter in another place": (
        "v1/worker/gpu/model_states/interface.py",
        (
            "self, req_index: int, new_req_data: NewRequestData",
            "self, new_req_data: NewRequestData, req_index: int",
        ),
        "vllm.v1.worker.gpu.model_states.interface.ModelState.add_request takes (new_req_data, "
        "req_index), not (req_index, new_req_data) first (needed by steering/vllm/runner_v2.py)",
    ),
    "a removed field": (
        "v1/engine/__init__.py",
        ("cache_salt: str | None", "salt: str | None"),
        "vllm.v1.engine.EngineCoreRequest has no 'cache_salt' (needed by steering/vllm/door.py)",
    ),
    "a field that is set elsewhere": (
        "config/parallel.py",
        ("    enable_hc_sp: bool", "    enable_stream_sp: bool"),
        "vllm.config.parallel.ParallelConfig has no 'enable_hc_sp' "
        "(needed by steering/vllm/support.py)",
    ),
    "a lost call": (
        "v1/worker/gpu_model_runner.py",
        ("self._model_forward(", "self.model("),
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model no longer mentions "
        "'_model_forward' (needed by steering/vllm/runner_v1.py)",
    ),
    "a renamed function": (
        "entrypoints/openai/completion/api_router.py",
        ("async def create_completion(", "async def complete("),
        "no create_completion in vllm.entrypoints.openai.completion.api_router "
        "(needed by server/routes/generate.py)",
    ),
    "a class that moved": (
        "v1/engine/input_processor.py",
        ("class InputProcessor", "class Preprocessor"),
        "no InputProcessor in vllm.v1.engine.input_processor (needed by steering/vllm/plugin.py)",
    ),
}

Doctor = Callable[[str, str, str], Path]


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """Make a copy of the installed vLLM in which one file differs: links to all the others."""

    def make(file: str, old: str, new: str) -> Path:
        here, there = INSTALLED, tmp_path / "vllm"
        for part in Path(file).parts:
            there.mkdir()
            for entry in here.iterdir():
                if entry.name != part:
                    (there / entry.name).symlink_to(entry)
            here, there = here / part, there / part
        text = here.read_text()
        assert old in text, f"{file} has no {old!r}"
        there.write_text(text.replace(old, new))
        return tmp_path / "vllm"

    return make


def test_installed_vllm_lacks_nothing() -> None:
    assert Source(INSTALLED).lacking(SEAMS) == []


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_named_in_one_line(doctor: Doctor, change: str) -> None:
    file, (old, new), line = CHANGES[change]
    lacking = Source(doctor(file, old, new)).lacking(SEAMS)
    assert line in lacking
    assert not any("\n" in what for what in lacking)


def test_folder_without_vllm_lacks_every_module(tmp_path: Path) -> None:
    lacking = Source(tmp_path).lacking(SEAMS)
    assert len(lacking) == sum(map(len, SEAMS.values()))
    assert Source(tmp_path).version == "of unknown version"


# Where it is said


def run(vllm: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(vllm.parent), str(ROOT)])
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_server_on_another_vllm_is_refused_in_one_line(doctor: Doctor) -> None:
    file, (old, new), line = CHANGES["a removed field"]
    done = run(doctor(file, old, new), "-m", "server", "serve", "no-model")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"vllm-sae: error: vLLM {Source(INSTALLED).version} cannot be steered, "
        f"vllm-sae knows 0.32 and 0.33: {line}"
    )
    assert "Traceback" not in done.stderr


def test_engine_on_another_vllm_is_refused_before_it_is_made(doctor: Doctor) -> None:
    file, (old, new), line = CHANGES["a class that moved"]
    code = (
        "from steering.config import SteeringConfig\n"
        "from steering.vllm.engine_arguments import engine_arguments\n"
        "engine_arguments(SteeringConfig(saes=(), d_model=64, num_layers=4))\n"
    )
    done = run(doctor(file, old, new), "-c", code)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("steering.vllm.support.UnsupportedEngineError: vLLM 0."), done.stderr
    assert line in last


# Whether the list is whole


def test_every_entry_belongs_to_a_module_of_ours() -> None:
    for ours in SEAMS:
        assert (ROOT / ours).is_file(), ours


def imports_of_vllm(file: Path) -> Iterator[tuple[str, str]]:
    """(module below vllm, name) of every import anywhere in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from ((n.removeprefix("vllm."), "") for n in names if n.startswith("vllm."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            below = (node.module or "").removeprefix("vllm").lstrip(".")
            yield from ((below, alias.name) for alias in node.names)


@pytest.mark.parametrize("package", ["steering", "server"])
def test_everything_imported_from_vllm_is_on_the_list(package: str) -> None:
    for file in sorted((ROOT / package).rglob("*.py")):
        seams = SEAMS.get(str(file.relative_to(ROOT)), ())
        listed = {
            (module, seam.name.partition(".")[0])
            for seam in seams
            for module in (seam.module, seam.or_in)
        }
        listed |= {(module, "") for module, _ in listed}
        for module, name in imports_of_vllm(file):
            as_module = f"{module}.{name}".lstrip(".")
            assert (module, name) in listed or (as_module, "") in listed, (
                f"{file.relative_to(ROOT)} imports {name} from vllm.{module}"
            )
