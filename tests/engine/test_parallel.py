"""Tensor and pipeline parallelism: every rank edits alike, a stage hooks only its own layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine import parallel_run
from tests.engine.interpreted import INTERPRETER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(model: Path, folder: Path, arguments: dict[str, Any], **env: str) -> list[dict[str, Any]]:
    """What ``parallel_run`` printed."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.engine.parallel_run", model, folder, json.dumps(arguments)],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", **env},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, finished.stderr[-4000:]
    result: list[dict[str, Any]] = json.loads(lines[0].removeprefix("RESULT "))
    return result


@pytest.fixture(scope="module")
def alone(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The same requests on one worker, in this process."""
    return parallel_run.run(tiny_model("llama"), tmp_path_factory.mktemp("alone"), {})


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left["tokens"] == right["tokens"]
        assert left["logprobs"] == pytest.approx(right["logprobs"], abs=2e-4)
        if right["steering"] is None:
            assert left["steering"] is None
            continue
        for ours, theirs in zip(
            left["steering"]["report"], right["steering"]["report"], strict=True
        ):
            for key, value in theirs.items():
                expected_value = pytest.approx(value, rel=1e-3) if "activation" in key else value
                assert ours[key] == expected_value, key
        if right["steering"]["read"] is not None:
            mine, reference = left["steering"]["read"], right["steering"]["read"]
            assert [t["position"] for t in mine["tokens"]] == [
                t["position"] for t in reference["tokens"]
            ]


def test_two_tensor_parallel_ranks_agree_with_one(
    alone: list[dict[str, Any]], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    assert_same(
        run(tiny_model("llama"), tmp_path, arguments, VLLM_ENABLE_V1_MULTIPROCESSING="1"), alone
    )


def test_two_pipeline_stages_agree_with_one(
    alone: list[dict[str, Any]], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    assert_same(
        run(
            tiny_model("llama"),
            tmp_path,
            arguments,
            VLLM_ENABLE_V1_MULTIPROCESSING="1",
            **INTERPRETER,
        ),
        alone,
    )
