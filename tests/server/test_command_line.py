"""The command line: what it refuses, and what it makes of vLLM's flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.errors import SAEError
from server.__main__ import main
from server.allow_list import PLUGIN_NAME
from server.commands import serve as serving
from server.start.checked_sae import unforeseen_refused
from server.start.errors import RefusedStartError
from server.start.flags import SAE_FLAG, split_flag
from steering.config import REFUSAL_VARIABLE, SteeringConfig
from tests.models import make_tiny_model, make_tiny_sae


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    return make_tiny_sae(tmp_path / "sae")


@pytest.fixture
def start(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Namespace]:
    """Run `serve MODEL FLAGS` in this process up to where vLLM takes over."""

    def run(*flags: str) -> Namespace:
        started: list[Namespace] = []
        monkeypatch.setattr(serving, "_run", started.append)
        monkeypatch.setattr("server.start.arguments.allow_ours", lambda *_: None)
        serving.serve([str(model), *flags])
        (args,) = started
        return args

    return run


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "server", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *said: str, code: int = 2) -> None:
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vllm-sae: ")
    for words in said:
        assert words in last


# Refusals, as a shell sees them


def break_tensor(sae: Path, **tensors: torch.Tensor | None) -> None:
    path = sae / "sae_weights.safetensors"
    changed = {**load_file(path), **tensors}
    save_file({name: t.contiguous() for name, t in changed.items() if t is not None}, path)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (lambda sae: break_tensor(sae, W_dec=None), "W_dec"),
    "misshaped tensor": (lambda sae: break_tensor(sae, b_enc=torch.zeros(3)), "b_enc"),
    "integer dtype": (
        lambda sae: break_tensor(sae, W_enc=torch.zeros(64, 128, dtype=torch.int32)),
        "W_enc",
    ),
    "not finite": (
        lambda sae: break_tensor(sae, b_enc=torch.full((128,), torch.nan)),
        "not finite",
    ),
    "truncated": (
        lambda sae: os.truncate(sae / "sae_weights.safetensors", 1000),
        "sae_weights.safetensors",
    ),
    "no configuration": (lambda sae: (sae / "cfg.json").unlink(), "cfg.json"),
    "damaged labels": (lambda sae: (sae / "features.jsonl").write_text("{"), "features.jsonl"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_sae_with_broken_files_is_refused(
    start: Callable[..., Namespace], sae: Path, how: str
) -> None:
    breaks, said = BROKEN[how]
    breaks(sae)
    with pytest.raises(RefusedStartError) as refused:
        start("--sae", f"a={sae}")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--sae", "/nonexistent"],
        ["--sae"],
        ["--sae", "a=SAE,sink_norm=-1"],
        ["--sae", "a=SAE,hook=blocks.1.hook_nothing"],
        ["--sae", "a=SAE,colour=red"],
        ["--sae", "a=SAE", "--sae=a=SAE"],
    ],
    ids=" ".join,
)
def test_flag_that_cannot_be_meant_is_refused(
    sae: Path,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("server.start.arguments.allow_ours", lambda *_: None)
    assert main(["serve", "no-model", *(flag.replace("SAE", str(sae)) for flag in flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-sae: error: ")


@pytest.mark.parametrize(("command", "code"), [("serve", 2), ("inspect-sae", 1)])
@pytest.mark.parametrize("source", ["~nosuchuser/x", "/tmp/" + "x" * 300])
def test_path_that_cannot_be_looked_up_is_refused_in_one_line(
    command: str,
    code: int,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("server.start.arguments.allow_ours", lambda *_: None)
    words = {"serve": ["m", "--sae", f"a={source}"], "inspect-sae": [source]}[command]
    assert main([command, *words]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-sae: ")
    assert source in line


COMMANDS: dict[str, tuple[list[str], int]] = {
    "serve": (["m", "--sae", "a=SAE"], 2),
    "inspect-sae": (["SAE"], 1),
    "import-labels": (["SAE", "/nowhere"], 1),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_nobody_foresaw_of_a_source_is_one_line(
    command: str,
    sae: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("a dtype\nof the future")

    monkeypatch.setattr("server.start.arguments.allow_ours", lambda *_: None)
    monkeypatch.setattr("sae.sae.open_layout", fail)
    words, code = COMMANDS[command]
    assert main([command, *(word.replace("SAE", str(sae)) for word in words)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{sae}: NotImplementedError: a dtype of the future")


def test_unforeseen_exception_is_kept_as_the_cause_and_an_interrupt_is_none() -> None:
    with pytest.raises(SAEError) as refused, unforeseen_refused("a"):
        raise ZeroDivisionError("by zero")
    assert isinstance(refused.value.__cause__, ZeroDivisionError)
    with pytest.raises(KeyboardInterrupt), unforeseen_refused("a"):
        raise KeyboardInterrupt


def test_refusal_is_one_line_with_exit_code_2() -> None:
    done = run("serve", "no-model", "--sae", "a=/nonexistent")
    assert_refused(done, "/nonexistent: no such file or folder")


def test_sae_of_another_width_is_refused_before_the_engine_starts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = make_tiny_sae(tmp_path / "wide", d_in=32)
    monkeypatch.setattr("server.start.arguments.allow_ours", lambda *_: None)
    monkeypatch.setattr(serving, "_run", lambda _: pytest.fail("the engine starts"))
    # Otherwise a line says so where little memory is free.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert main(["serve", str(model), "--sae", f"a={wide}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-sae: error: ")
    assert "d_in is 32" in line and "hidden size is 64" in line


def test_layer_that_does_not_exist_is_refused(
    start: Callable[..., Namespace], tmp_path: Path
) -> None:
    with pytest.raises(RefusedStartError, match="layer 9 does not exist"):
        start("--sae", f"a={make_tiny_sae(tmp_path / 'deep', layer=9)}")


def test_engine_that_cannot_be_steered_is_refused(
    start: Callable[..., Namespace], sae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steering.vllm.support

    def refuse(config: Any) -> None:
        raise steering.vllm.support.UnsupportedEngineError("SAE steering does not work with this")

    monkeypatch.setattr(steering.vllm.support, "refuse_unsupported", refuse)
    with pytest.raises(RefusedStartError, match="does not work with this"):
        start("--sae", f"a={sae}")


def test_worker_that_cannot_steer_the_model_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def fail(args: Namespace) -> None:
        Path(os.environ[REFUSAL_VARIABLE]).write_text("no decoder layers found\n")
        raise RuntimeError("Engine core initialization failed")

    monkeypatch.setattr(ServeSubcommand, "cmd", fail)
    monkeypatch.setattr(serving, "serve", lambda argv: serving._run(Namespace()))
    assert main(["serve", "m"]) == 2
    assert capsys.readouterr().err == "vllm-sae: error: no decoder layers found\n"


def test_vllms_own_failure_stays_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def fail(args: Namespace) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ServeSubcommand, "cmd", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        serving._run(Namespace())


# What vLLM is given


def test_flags_of_vllm_pass_through_and_the_engine_steers(
    start: Callable[..., Namespace], sae: Path, model: Path
) -> None:
    args = start(
        *("--sae", f"a={sae},sink_norm=50", "--max-model-len", "128", "--api-server-count=2"),
        *("--additional-config", '{"mine": 1}', "--steering-max-rows", "100"),
        *("--steering-max-read-values", "200", "--steering-max-body-bytes", "3000"),
    )
    assert (args.model, args.max_model_len, args.api_server_count) == (str(model), 128, 2)
    assert args.worker_cls == "steering.vllm.worker.SteeringWorker"
    assert args.scheduler_cls == "steering.vllm.scheduler.SteeringScheduler"
    assert args.additional_config["mine"] == 1
    config = SteeringConfig.from_additional_config(args.additional_config)
    assert config is not None
    assert (config.d_model, config.num_layers, config.max_rows) == (64, 4, 100)
    assert (config.max_read_values, args.steering_max_body_bytes) == (200, 3000)
    assert config.special_token_ids == (0, 1, 2, 3)
    assert [(ref.name, ref.sink_norm, ref.path) for ref in config.saes] == [("a", 50.0, str(sae))]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [([], None), (["--steering-self-check"], True), (["--no-steering-self-check"], False)],
)
def test_self_check_is_on_unless_told_otherwise(
    start: Callable[..., Namespace], sae: Path, flags: list[str], wanted: bool | None
) -> None:
    assert start("--sae", f"a={sae}", *flags).steering_self_check is wanted


def test_without_saes_the_engine_is_vllms(start: Callable[..., Namespace]) -> None:
    args = start("--dtype", "float32")
    assert (args.worker_cls, args.scheduler_cls, args.additional_config) == ("auto", None, {})


def test_saes_may_stand_in_a_configuration_file(
    start: Callable[..., Namespace], sae: Path, tmp_path: Path
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(json.dumps({"sae": [f"a={sae}", f"b={sae}"], "max-model-len": 99}))
    args = start("--config", str(path))
    config = SteeringConfig.from_additional_config(args.additional_config)
    assert config is not None
    assert [ref.name for ref in config.saes] == ["a", "b"]
    assert args.max_model_len == 99


def test_sae_flags_are_taken_out_wherever_they_stand() -> None:
    argv = ["--sae", "a=1,hook=x", "model", "--sae=b=2", "--port", "5", "--sae", "c=3"]
    assert split_flag(SAE_FLAG, "NAME=SOURCE", argv) == (
        ["a=1,hook=x", "b=2", "c=3"],
        ["model", "--port", "5"],
    )


def test_plugin_goes_by_the_name_on_the_list() -> None:
    from server.plugin import SteeringEndpointPlugin

    assert SteeringEndpointPlugin.name == PLUGIN_NAME


# inspect-sae


def test_inspect_prints_the_card(sae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-sae", f"{sae},sink_norm=7"]) == 0
    out = capsys.readouterr().out
    for words in ("SAE sae", "blocks.1.hook_resid_post", "jumprelu", "sae_lens", "7.0"):
        assert words in out


def test_inspect_scans_everything_and_fails_in_one_line(
    sae: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_tensor(sae, b_enc=torch.full((128,), torch.inf))
    monkeypatch.setattr("server.start.checked_sae.SCAN_LIMIT_BYTES", 0)
    assert main(["inspect-sae", str(sae)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "b_enc of feature 0" in captured.err


def test_inspect_of_nothing_exits_with_1() -> None:
    assert_refused(run("inspect-sae", "/nonexistent"), "/nonexistent", code=1)


def test_unknown_command_is_explained() -> None:
    done = run("explode")
    assert done.returncode == 2
    assert "inspect-sae" in done.stderr
