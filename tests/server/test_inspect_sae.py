"""`vllm-sae inspect-sae`: its arguments, what it refuses in one line, and what it prints."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sae.self_check import Measured, Outcome, Stated
from sae.source import ResolvedSAE
from server.__main__ import main
from server.commands import inspect_sae as inspecting
from server.commands.inspect_sae import inspect_sae
from server.start import checked_sae
from server.start.checked_sae import check_reference
from server.start.errors import RefusedStartError
from tests.models import make_tiny_model, make_tiny_sae
from tests.sae.control_vectors import write_gguf


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    return make_tiny_sae(tmp_path / "sae")


@pytest.fixture(autouse=True)
def unchanged_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets for its own process is not for those of other tests."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setattr(inspecting, "allow_ours", lambda *_: None)


@pytest.mark.parametrize(
    "words",
    [
        ["inspect-sae"],
        ["inspect-sae", "SAE", "another"],
        ["inspect-sae", "SAE", "--dtype", "float32"],
        ["inspect-sae", "SAE", "--model"],
        ["import-labels", "SAE", "export", "--model", "m"],
        ["inspect-sae", "SAE", "--model", "MODEL", "--no-such-flag"],
    ],
    ids=" ".join,
)
def test_usage_error_exits_with_2(
    sae: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"SAE": str(sae), "MODEL": str(tmp_path)}
    with pytest.raises(SystemExit) as exited:
        main([named.get(word, word) for word in words])
    assert exited.value.code == 2
    assert "usage: vllm-sae" in capsys.readouterr().err


def assert_refused(capsys: pytest.CaptureFixture[str], *said: str) -> None:
    """The card was printed, and one line on stderr."""
    captured = capsys.readouterr()
    assert "SAE sae" in captured.out
    last = captured.err.splitlines()[-1]
    assert last.startswith("vllm-sae: ")
    assert "Traceback" not in captured.err
    for words in said:
        assert words in last


def test_model_that_is_not_there_is_refused_in_one_line(
    sae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect-sae", str(sae), "--model", "/nonexistent"]) == 1
    assert_refused(capsys, "cannot run /nonexistent: ")


def test_model_of_another_width_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_model(tmp_path / "model")
    wide = make_tiny_sae(tmp_path / "sae", d_in=32)
    flags = ["--dtype", "float32", "--max-model-len", "64"]
    assert main(["inspect-sae", str(wide), "--model", str(model), *flags]) == 1
    assert_refused(capsys, "d_in is 32", "hidden size is 64")


def test_flag_that_leaves_no_place_for_steering_is_refused_in_one_line(
    sae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect-sae", str(sae), "--model", "m", "--skip-tokenizer-init"]) == 1
    assert_refused(capsys, "--skip-tokenizer-init")


def printed(
    sae: Path, outcome: Outcome | Exception, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """Exit code and output with this outcome of running the model."""

    def measured(checked: Any, model: str, flags: Any) -> Outcome:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(inspecting, "check_on_model", measured)
    out = io.StringIO()
    return inspect_sae(str(sae), "m", console=Console(file=out, width=60)), out.getvalue()


@pytest.mark.parametrize("name", ["[v2]", "[/v2]", "x[bold]y", "x" * 200])
def test_source_is_printed_as_it_is_and_in_one_piece_where_nobody_looks_on(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_sae(tmp_path / name)
    assert main(["inspect-sae", str(folder)]) == 0
    out = capsys.readouterr().out
    assert str(folder) in out
    assert "[v2]" not in name or "SAE [v2]" in out


def test_every_layer_of_a_control_vector_has_a_card_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "calm.gguf", {layer: torch.ones(8) for layer in (1, 4)})
    assert main(["inspect-sae", f"{path},layer=all"]) == 0
    out = capsys.readouterr().out
    assert out.count("│ direction") == 3 * 2  # kind, architecture and format
    for layer in (1, 4):
        assert f"calm.gguf.{layer}" in out
        assert f"blocks.{layer}.hook_resid_post" in out
    assert main(["inspect-sae", f"{path},layer=2"]) == 1
    assert "has no direction of layer 2, only of 1, 4" in capsys.readouterr().err


def test_direction_has_nothing_to_measure_on_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspecting, "check_on_model", lambda *_: pytest.fail("it was checked"))
    path = write_gguf(tmp_path / "calm.gguf", {1: torch.ones(8)})
    assert main(["inspect-sae", str(path), "--model", "some/model"]) == 0
    assert "a direction reconstructs nothing" in capsys.readouterr().out


def outcome_of(sae: Path, **stated: Any) -> Outcome:
    card = check_reference(ResolvedSAE("a", str(sae), path=str(sae)), scan_limit=None).card
    return Outcome(card, Measured(400, 1, 7.5, 0.75), Stated(**stated), "some/model-it")


def test_measured_values_stand_beside_the_stated_ones(
    sae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = outcome_of(sae, l0=8.0, variance_explained=0.8, model="some/model-it")
    code, out = printed(sae, outcome, monkeypatch)
    assert code == 0
    assert "on 400 tokens, sinks left out: 1" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert ["L0", "7.5", "8"] in rows
    assert ["variance explained", "0.75", "0.8"] in rows
    assert "warning" not in out


def test_misfit_is_one_line_however_narrow_the_terminal_and_no_refusal(
    sae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = outcome_of(sae, l0=40.0, variance_explained=0.95, model="model")
    code, out = printed(sae, outcome, monkeypatch)
    assert code == 0
    assert out.splitlines()[-1] == (
        "warning: L0 is 0.19 times what is stated; variance explained is 0.20 below what is "
        "stated; likely the wrong layer, hook or model (base for instruct, say); it was trained "
        "on model and this is some/model-it: one is the base model, the other its instruct version"
    )


def test_refusal_of_the_engine_exits_with_1(
    sae: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = printed(sae, RefusedStartError("cannot run m: no memory"), monkeypatch)
    assert code == 1
    assert "SAE sae" in out
    assert capsys.readouterr().err == "vllm-sae: cannot run m: no memory\n"


def test_what_the_files_leave_open_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = {"normalize_activations": "expected_average_only_in"}
    sae = make_tiny_sae(tmp_path / "sae", config=stated)
    monkeypatch.setattr(checked_sae.logger, "propagate", False)
    monkeypatch.setattr(checked_sae.logger, "handlers", [caplog.handler])
    caplog.set_level("WARNING", checked_sae.logger.name)
    assert inspect_sae(str(sae)) == 0
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"{sae}/cfg.json: trained with normalize_activations expected_average")
