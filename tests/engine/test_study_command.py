"""`vllm-sae study` with an engine of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from server.__main__ import main
from tests.models import make_tiny_sae

FLAGS: Final = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256")
MEMORY: Final = ("--kv-cache-memory-bytes", str(64 * 2**20), "--max-num-seqs", "8")
CONTRAST: Final = {"positive": [{"prompt": "The snow fell"}], "negative": [{"prompt": "A sea"}]}
EDIT: Final = {"interventions": [{"sae": "a", "feature": 3, "op": "add", "value": 2}]}


def test_command_runs_the_studies_of_a_file_on_an_engine_of_its_own(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = make_tiny_sae(tmp_path / "a")
    file, out = tmp_path / "study.json", tmp_path / "answer.json"
    studies = {
        "contrast": {"study": "contrast", "sae": "a", "body": CONTRAST},
        "forecast": {"route": "/v1/steering/forecast", "body": {"steering": EDIT}},
        "refused": {"study": "contrast", "sae": "a", "body": {**CONTRAST, "top_k": 0}},
    }
    file.write_text(json.dumps(studies))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    words = ("study", str(file), "-o", str(out), "--model", str(tiny_model("llama")))
    assert main([*words, "--sae", f"a={sae}", *FLAGS, *MEMORY]) == 1
    answers = json.loads(out.read_text())
    assert [*answers] == [*studies]
    assert answers["contrast"]["positive"]
    assert answers["forecast"]["edits"][0]["norm"] == pytest.approx(2, rel=1e-5)
    assert answers["refused"]["error"]["param"] == "top_k"
