"""Presets on the command line: what is taken, and what ends the start in one line."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.__main__ import main
from server.commands import serve as serving
from server.start.errors import RefusedStartError
from server.start.flags import PRESET_FLAG, ServerOptions, split_flag
from tests.models import make_tiny_model, make_tiny_sae

EDIT = {"interventions": [{"sae": "a", "feature": 5, "op": "clamp", "value": 1}]}

Start = Callable[..., Namespace]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sae(tmp_path_factory.mktemp("sae"))


@pytest.fixture
def start(model: Path, sae: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Run `serve MODEL --sae a=SAE FLAGS` in this process up to where vLLM takes over."""

    def run(*flags: str, with_sae: bool = True) -> Namespace:
        started: list[Namespace] = []
        monkeypatch.setattr(serving, "_run", started.append)
        monkeypatch.setattr("server.start.arguments.allow_ours", lambda *_: None)
        serving.serve([str(model), *(("--sae", f"a={sae}") if with_sae else ()), *flags])
        (args,) = started
        return args

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "calm.json"
    path.write_text(json.dumps(EDIT))
    return path


def test_presets_reach_the_options(start: Start, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    flags = ("--steering-preset", f"x={file}", f"--steering-preset=y={file}")
    more = ("--steering-presets", str(folder), "--steering-default", "y")
    options = ServerOptions.of(start(*flags, *more))
    assert options.presets == (f"x={file}", f"y={file}")
    assert (options.preset_folder, options.default_preset) == (str(folder), "y")


def test_presets_may_stand_in_a_configuration_file(
    start: Start, file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(json.dumps({"steering-preset": [f"x={file}"], "steering-default": "y"}))
    args = start("--config", str(path), "--steering-preset", f"y={file}")
    assert set(ServerOptions.of(args).presets) == {f"x={file}", f"y={file}"}


def test_flags_are_taken_out_and_the_folders_is_left() -> None:
    argv = ["--steering-preset=a=1", "m", "--steering-presets", "d", "--steering-preset", "b=2"]
    taken = split_flag(PRESET_FLAG, "NAME=FILE", argv)
    assert taken == (["a=1", "b=2"], ["m", "--steering-presets", "d"])
    with pytest.raises(RefusedStartError, match="expected NAME=FILE after it"):
        split_flag(PRESET_FLAG, "NAME=FILE", ["--steering-preset"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"interventions": []}, "steering.interventions"),
        ({"interventions": [{**EDIT["interventions"][0], "sae": "b"}]}, 'no SAE "b" is loaded'),
        ({"steering": EDIT, "name": "x"}, "unknown field 'name'"),
        (None, "No such file"),
    ],
)
def test_wrong_preset_is_refused_in_one_line_that_names_its_file(
    start: Start, tmp_path: Path, content: Any, said: str
) -> None:
    path = tmp_path / "calm.json"
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(RefusedStartError) as refused:
        start("--steering-preset", f"calm={path}")
    line = str(refused.value)
    assert said in line and str(path) in line and "\n" not in line


def test_wrong_file_of_the_folder_is_refused(start: Start, file: Path) -> None:
    file.write_text("{")
    with pytest.raises(RefusedStartError, match=r"calm\.json: not JSON"):
        start("--steering-presets", str(file.parent))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steering-preset", "a/b=FILE"], "preset 'a/b'"),
        (["--steering-preset", "FILE"], "expected NAME=FILE"),
        (["--steering-preset", "x=FILE", "--steering-preset", "x=FILE"], "two presets are named"),
        (["--steering-preset", "x=FILE", "--served-model-name", "x"], "served model or adapter"),
        (
            ["--steering-preset", "x=FILE", "--served-model-name", "m", "x"],
            "served model or adapter",
        ),
        (
            ["--steering-preset", "x=FILE", "--enable-lora", "--lora-modules", "x=/nowhere"],
            "served model or adapter",
        ),
        (["--steering-default", "x"], "--steering-default x: there is no such preset"),
        (["--steering-presets", "/nowhere"], "--steering-presets /nowhere: no such folder"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_flags_that_cannot_be_meant_are_refused(
    start: Start, file: Path, flags: list[str], said: str
) -> None:
    with pytest.raises(RefusedStartError, match=said):
        start(*(flag.replace("FILE", str(file)) for flag in flags))


@pytest.mark.parametrize("flag", ["--steering-preset", "--steering-presets", "--steering-default"])
def test_presets_need_an_sae(start: Start, file: Path, flag: str) -> None:
    value = {"--steering-preset": f"x={file}", "--steering-presets": str(file.parent)}
    with pytest.raises(RefusedStartError, match=f"{flag}: a preset steers through an SAE"):
        start(flag, value.get(flag, "x"), with_sae=False)


def test_refusal_ends_the_command_with_code_2(
    model: Path,
    sae: Path,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("server.start.arguments.allow_ours", lambda *_: None)
    file.write_text("{")
    words = ["serve", str(model), "--sae", f"a={sae}", "--steering-preset", f"calm={file}"]
    assert main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vllm-sae: error: preset 'calm': ") and "not JSON" in last


def test_batch_file_has_no_presets(
    model: Path,
    sae: Path,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("server.start.arguments.allow_ours", lambda *_: None)
    words = ["run-batch", "-i", "in", "-o", "out", "--model", str(model), "--sae", f"a={sae}"]
    assert main([*words, "--steering-preset", f"x={file}"]) == 2
    assert "only a server has presets" in capsys.readouterr().err.splitlines()[-1]
