"""`vllm-sae import-labels`: what it writes, where, and what it refuses."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.sae import open_sae
from sae.source import ResolvedSAE, SAEReference
from server.__main__ import main
from server.commands.import_labels import features_path
from steering.config import SteeringConfig
from steering.request.catalog import Catalog
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_sae


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    """Feature 1's decoder row has norm 2, all others norm 1."""
    folder = make_tiny_sae(tmp_path / "sae")
    weights = folder / "sae_weights.safetensors"
    tensors = load_file(weights)
    tensors["W_dec"][1] *= 2
    save_file(tensors, weights)
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write(tmp_path / "export/features/batch-0.jsonl.gz", {"index": "1", "maxActApprox": 7.0})
    write(tmp_path / "export/explanations/batch-0.jsonl.gz", {"index": "1", "description": "ships"})
    return tmp_path / "export"


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def catalog(sae: Path) -> Catalog:
    """What a server would make of the SAE."""
    reference = ResolvedSAE("a", str(sae), path=str(sae))
    return Catalog.from_config(SteeringConfig((reference,), D_MODEL, NUM_LAYERS))


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("vllm-sae: ")
    return str(line)


def test_imported_statistics_are_served_in_the_saes_own_units(
    sae: Path, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import-labels", str(sae), str(export)]) == 0
    # Neuronpedia's 7 is f * |W_dec|.
    feature = catalog(sae).features("a").get(1)
    assert feature.max_activation == pytest.approx(3.5)
    assert feature.label == "ships"
    assert catalog(sae).card("a").has_labels
    out = capsys.readouterr().out
    assert out == (f"{sae}/features.jsonl: 1 of 128 features, 1 labels, 1 maximum activations\n")


def test_import_replaces_what_was_known_before(sae: Path, export: Path) -> None:
    (sae / "features.jsonl").write_text('{"index": 5, "label": "an older label"}\n')
    assert main(["import-labels", str(sae), str(export)]) == 0
    features = catalog(sae).features("a")
    assert (features.label(1), features.label(5)) == ("ships", None)


def test_parts_of_an_export_may_lie_apart(sae: Path, export: Path, tmp_path: Path) -> None:
    labels = write(tmp_path / "explanations/batch-1.jsonl.gz", {"index": 2, "description": "coal"})
    assert main(["import-labels", str(sae), str(export), str(labels)]) == 0
    features = catalog(sae).features("a")
    assert [features.label(index) for index in (1, 2)] == ["ships", "coal"]


def test_folder_called_like_weights_is_none(sae: Path) -> None:
    (sae / "checkpoint.pt").mkdir()
    assert features_path(sae) == sae / "features.jsonl"


def test_one_of_several_weights_gets_a_file_of_its_own(sae: Path, export: Path) -> None:
    weights = sae / "sae_weights.safetensors"
    shutil.copy(weights, sae / "other.safetensors")
    assert main(["import-labels", str(weights), str(export)]) == 0
    assert features_path(weights) == sae / "sae_weights.safetensors.features.jsonl"
    assert catalog(weights).features("a").label(1) == "ships"
    assert catalog(sae / "other.safetensors").features("a").label(1) is None


def test_file_that_is_read_is_the_file_that_is_written(sae: Path, export: Path) -> None:
    own = sae / "sae_weights.safetensors.features.jsonl"
    own.write_text("")
    assert main(["import-labels", str(sae), str(export)]) == 0
    assert "ships" in own.read_text()
    assert not (sae / "features.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"index": "128"}, "index '128' not in [0, 128): not of this SAE"),
        ({"index": "1", "maxActApprox": "much"}, "maxActApprox must be a finite number"),
    ],
)
def test_export_of_another_sae_is_refused_and_labels_stay(
    sae: Path, export: Path, row: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (sae / "features.jsonl").write_text('{"index": 5, "label": "an older label"}\n')
    write(export / "features/batch-1.jsonl.gz", row)
    assert main(["import-labels", str(sae), str(export)]) == 1
    assert said in refusal(capsys)
    assert catalog(sae).features("a").label(5) == "an older label"
    assert sorted(path.name for path in sae.iterdir()) == [
        "cfg.json",
        "features.jsonl",
        "sae_weights.safetensors",
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"modelId": "gpt2-small"}, "of the model 'gpt2-small', the SAE of 'tiny'"),
        ({"layer": "5-res-jb"}, "of layer 5 ('5-res-jb'), the SAE is at blocks.1.hook_resid_post"),
        ({"index": "128"}, "index '128' not in [0, 128): not of this SAE"),
    ],
)
def test_export_of_another_sae_is_imported_when_told_to(
    sae: Path, export: Path, row: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(export / "features/batch-1.jsonl.gz", {"index": "2"} | row)
    assert main(["import-labels", str(sae), str(export)]) == 1
    line = refusal(capsys)
    assert said in line
    assert line.endswith("to import it all the same, add --force")
    assert main(["import-labels", str(sae), str(export), "--force"]) == 0
    assert catalog(sae).features("a").label(1) == "ships"


def test_what_is_no_export_is_refused(
    sae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = write(tmp_path / "batch-0.jsonl.gz", {"index": 0})
    for export in (tmp_path, stray, tmp_path / "nowhere"):
        assert main(["import-labels", str(sae), str(export)]) == 1
        assert f"{export}: not a Neuronpedia export" in refusal(capsys)


def test_sae_that_cannot_be_opened_is_refused(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import-labels", "/nonexistent", str(export)]) == 1
    assert "/nonexistent: no such file or folder" in refusal(capsys)


def test_decoder_that_is_not_finite_is_refused(
    sae: Path, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = sae / "sae_weights.safetensors"
    tensors = load_file(weights)
    tensors["W_dec"][1, 3] = torch.nan
    save_file(tensors, weights)
    assert main(["import-labels", str(sae), str(export)]) == 1
    assert "W_dec of feature 1 has a value that is not finite" in refusal(capsys)
    assert not open_sae(SAEReference("a", str(sae))).card.has_labels


def test_folder_that_cannot_be_written_is_refused(
    sae: Path, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Root may write anywhere, but not into a folder as if it were a file.
    (sae / "features.jsonl.unfinished").mkdir()
    assert main(["import-labels", str(sae), str(export)]) == 1
    assert "features.jsonl.unfinished" in refusal(capsys)


def test_help_says_what_an_export_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["import-labels", "-h"])
    assert done.value.code == 0
    assert "batch-N.jsonl.gz" in capsys.readouterr().out
