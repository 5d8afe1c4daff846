"""The first minutes: memory on a CPU, why an engine did not start, commands that are mistyped."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from server.__main__ import COMMANDS, main
from server.commands import serve as serving
from server.start.cpu_memory import KV_CACHE_VARIABLE, leave_memory, share_of_memory
from server.start.engine import naming_the_cause
from server.start.errors import EngineStartError, in_one_line
from server.start.flags import ServerOptions, add_flags, flags_help
from steering.config import REFUSAL_VARIABLE
from steering.vllm.start_failure import FAILURE_VARIABLE, leave_word_of_failure

GIB = 2**30


def node(total: float, free: float) -> SimpleNamespace:
    return SimpleNamespace(total_memory=int(total * GIB), available_memory=int(free * GIB))


# Memory


@pytest.mark.parametrize(
    ("nodes", "workers", "share"),
    [
        ([(100, 95)], 1, None),  # what vLLM asks for is there
        ([(100, 40)], 1, 0.3),
        ([(100, 40)], 2, 0.15),
        ([(100, 60), (100, 40)], 2, 0.3),  # one worker a node, the fuller one decides
        ([(100, 0.001)], 1, 0.01),
    ],
)
def test_share_is_three_quarters_of_what_is_free(
    nodes: list[tuple[float, float]], workers: int, share: float | None
) -> None:
    assert share_of_memory([node(*each) for each in nodes], workers, 0.92) == share


def memory_parser() -> ArgumentParser:
    """Those of vLLM's flags that decide about memory."""
    parser = ArgumentParser()
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    for kind in ("tensor", "pipeline", "data"):
        parser.add_argument(f"--{kind}-parallel-size", type=int, default=1)
    return parser


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which half of the memory is free, and no setting of the user's."""
    monkeypatch.delenv(KV_CACHE_VARIABLE, raising=False)
    resources = "vllm.utils.cpu_resource_utils"
    monkeypatch.setattr(f"{resources}.get_visible_memory_node", lambda: [0])
    monkeypatch.setattr(f"{resources}.get_memory_node_info", lambda each: node(24, 12))


def left(*flags: str) -> Namespace:
    parser = memory_parser()
    args = parser.parse_args(flags)
    leave_memory(args, parser)
    return args


@pytest.mark.usefixtures("crowded")
def test_engine_takes_a_share_of_what_is_free_and_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert left().gpu_memory_utilization == 0.37
    (line,) = capsys.readouterr().err.splitlines()
    for said in ("24.0 GiB", "12.0 are free", "--gpu-memory-utilization 0.37", KV_CACHE_VARIABLE):
        assert said in line


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize(
    "flags",
    [["--gpu-memory-utilization", "0.92"], ["--kv-cache-memory-bytes", "5"]],
    ids=" ".join,
)
def test_users_own_setting_stays(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert left(*flags).gpu_memory_utilization == 0.92
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("crowded")
def test_users_own_variable_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KV_CACHE_VARIABLE, "2")
    assert left().gpu_memory_utilization == 0.92


# Why an engine did not start


@pytest.fixture
def vllm_logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """vLLM's logger, which loses the handlers that a test puts on it."""
    logger = logging.getLogger("vllm")
    others = [
        each
        for each in logger.handlers
        if type(each).__module__ != leave_word_of_failure.__module__
    ]
    monkeypatch.setattr(logger, "handlers", others)
    return logger


def fail(logger: logging.Logger, words: str, error: Exception) -> None:
    """Log an exception as a process of vLLM's does before it ends."""
    try:
        raise error
    except Exception:
        logger.getChild("v1.engine.core").exception(words)


def test_cause_is_what_the_first_process_that_ended_says(vllm_logger: logging.Logger) -> None:
    with pytest.raises(EngineStartError) as failed, naming_the_cause():
        leave_word_of_failure()
        fail(vllm_logger, "Something that can be borne", KeyError("x"))
        fail(vllm_logger, "WorkerProc failed to start.", ValueError("no memory:\n\n  8 GiB"))
        fail(vllm_logger, "EngineCore failed to start.", RuntimeError("see above"))
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    assert str(failed.value) == "ValueError: no memory: 8 GiB"


def test_process_that_nobody_waits_for_leaves_no_word(
    vllm_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(vllm_logger.handlers)
    monkeypatch.delenv(FAILURE_VARIABLE, raising=False)
    leave_word_of_failure()
    assert vllm_logger.handlers == before
    monkeypatch.setenv(FAILURE_VARIABLE, "/nowhere/failure")
    leave_word_of_failure()
    leave_word_of_failure()
    assert len(vllm_logger.handlers) == len(before) + 1
    fail(vllm_logger, "EngineCore failed to start.", ValueError("late"))


@pytest.mark.parametrize(
    ("error", "code"),
    [(EngineStartError("ValueError: no memory"), 1), (OSError(98, "Address\nin use"), 1)],
)
def test_whatever_ends_a_start_is_the_last_line(
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raise_it(argv: Any) -> None:
        raise error

    monkeypatch.setattr(serving, "serve", raise_it)
    assert main(["serve", "m"]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    says = str(error) if isinstance(error, EngineStartError) else in_one_line(error)
    assert last == f"vllm-sae: error: {says}"


def test_python_says_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error::DeprecationWarning")
    for variable in (REFUSAL_VARIABLE, FAILURE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    with naming_the_cause():
        code = (
            "import warnings; warnings.warn('resource_tracker: There appear to be 2 leaked');"
            "warnings.warn('mine')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "resource_tracker: There" not in done.stderr.replace(code, "")
    assert "UserWarning: mine" in done.stderr
    assert os.environ["PYTHONWARNINGS"] == "error::DeprecationWarning"
    assert FAILURE_VARIABLE not in os.environ


# Flags and commands


def test_flags_of_ours_come_first_in_the_help_and_only_where_they_say_something() -> None:
    served, batch = flags_help(routes=True), flags_help(routes=False)
    for flag in ("--sae", "--steering-max-rows", "--steering-max-read-values"):
        assert flag in served and flag in batch
    for flag in ("--steering-max-body-bytes", "--no-steering-self-check"):
        assert flag in served and flag not in batch


def test_parsed_flags_are_the_options() -> None:
    parser = ArgumentParser()
    add_flags(parser, routes=True)
    assert ServerOptions.of(parser.parse_args([])) == ServerOptions()
    words = ["--sae", "a=1", "--sae", "b=2", "--steering-max-rows", "70"]
    options = ServerOptions.of(parser.parse_args([*words, "--no-steering-self-check"]))
    assert options == ServerOptions(saes=("a=1", "b=2"), max_rows=70, self_check=False)
    assert ServerOptions.of(parser.parse_args([])).saes == ()


def test_options_of_vllms_own_command_are_the_defaults() -> None:
    assert ServerOptions.of(Namespace()) == ServerOptions()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sreve", "m"], "did you mean `vllm-sae serve`?"),
        (["runbatch"], "did you mean `vllm-sae run-batch`?"),
        (["OWNER/MODEL", "--sae", "a=b"], "did you mean `vllm-sae serve OWNER/MODEL --sae ...`?"),
        (["explode"], ", ".join(COMMANDS)),
    ],
)
def test_mistyped_command_is_told_what_was_meant(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-sae: error: ") and said in line


def test_without_a_command_there_is_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().err
    for command in COMMANDS:
        assert f"vllm-sae {command}" in said or f"    {command}" in said
