from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae.card import UNIT_TIMES_DECODER_NORM, SAECard
from sae.errors import SAEError
from sae.features import Example, Feature, FeatureTable
from sae.neuronpedia import BATCH, ImportSummary, import_neuronpedia, same
from tests.sae.cards import CARD as LARGE_CARD

CARD = replace(LARGE_CARD, d_sae=3)
NORMS = [0.5, 2.0, 0.0]


def write(folder: Path, name: str, *rows: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder / name


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A source of three features, spelled as Neuronpedia spells them."""
    root = tmp_path / "export"
    write(
        root / "features", "batch-0.jsonl.gz",
        {"modelId": "m", "layer": "15-res", "index": "0", "maxActApprox": 3.0, "frac_nonzero": 0.01,
         "pos_str": ["a"], "pos_values": [1.0], "topkCosSimIndices": [1]},
        {"modelId": "m", "layer": "15-res", "index": "2", "maxActApprox": 0.0, "frac_nonzero": 0},
    )  # fmt: skip
    write(root / "features", "batch-10.jsonl.gz", {"index": "1", "maxActApprox": 8})
    write(
        root / "explanations", "batch-0.jsonl.gz",
        {"index": "1", "description": " jazz music ", "embedding": [0.1]},
        {"index": "1", "description": "another opinion"},
        {"index": "0", "description": ""},
    )  # fmt: skip
    write(
        root / "activations", "batch-0.jsonl.gz",
        {"index": "1", "tokens": ["▁a", "▁jazz", "▁band", "↵"], "values": [0, 6.0, 1.0, 0],
         "maxValue": 6.0},
        {"index": "1", "tokens": ["▁a", "▁jazz", "▁band", "↵"], "values": [0, 6.0, 1.0, 0]},
        {"index": "1", "tokens": ["so", " it", " is"], "values": [0, 0, 7.5], "maxValue": 7.5},
        {"index": "1", "tokens": ["never"], "values": [0], "maxValue": 0},
    )  # fmt: skip
    return root


def test_statistics_are_divided_by_the_decoder_norm(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.jsonl"
    summary = import_neuronpedia(export, out, CARD, NORMS)
    assert summary == ImportSummary(features=3, labels=1, max_activations=2)
    table = FeatureTable.open(tmp_path, CARD.d_sae)
    assert table.get(0) == Feature(0, max_activation=6.0, density=0.01)
    assert table.get(1) == Feature(
        index=1,
        label="jazz music",
        max_activation=4.0,
        examples=(Example("so it is", 3.75), Example("a jazz band", 3.0)),
    )
    # Its decoder row is zero: what it would be in plain units, nobody knows.
    assert table.get(2) == Feature(2, density=0.0)


def test_statistics_stay_where_the_card_counts_decoder_norms_too(
    export: Path, tmp_path: Path
) -> None:
    card = replace(CARD, activation_unit=UNIT_TIMES_DECODER_NORM)
    import_neuronpedia(export, tmp_path / "features.jsonl", card, NORMS)
    table = FeatureTable.open(tmp_path, CARD.d_sae)
    assert [table.max_activation(index) for index in range(3)] == [3.0, 8.0, 0.0]
    assert table.get(1).examples[0].activation == 7.5


def test_export_of_labels_alone_is_enough(tmp_path: Path) -> None:
    write(tmp_path / "explanations", "batch-0.jsonl.gz", {"index": "2", "description": "x"})
    summary = import_neuronpedia(tmp_path, tmp_path / "features.jsonl", CARD, NORMS)
    assert summary == ImportSummary(features=1, labels=1, max_activations=0)


def test_long_example_is_cut_around_its_strongest_token(tmp_path: Path) -> None:
    tokens = [f" t{place}" for place in range(100)]
    values = [float(place == 50) for place in range(100)]
    row = {"index": "0", "tokens": tokens, "values": values}
    write(tmp_path / "activations", "batch-0.jsonl.gz", row)
    import_neuronpedia(tmp_path, tmp_path / "features.jsonl", CARD, NORMS)
    (example,) = FeatureTable.open(tmp_path, CARD.d_sae).get(0).examples
    assert example == Example(" ".join(f"t{place}" for place in range(26, 59)), 2.0)


def test_ten_strongest_examples_are_kept(tmp_path: Path) -> None:
    rows = [{"index": "0", "tokens": [f"t{value}"], "values": [value]} for value in range(1, 31)]
    write(tmp_path / "activations", "batch-0.jsonl.gz", *rows)
    import_neuronpedia(tmp_path, tmp_path / "features.jsonl", CARD, NORMS)
    examples = FeatureTable.open(tmp_path, CARD.d_sae).get(0).examples
    assert [example.text for example in examples] == [f"t{value}" for value in range(30, 20, -1)]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("features", "{", "line 1: not valid JSON"),
        ("features", [1], "line 1: expected an object"),
        ("features", {"index": "3"}, r"index '3' not in \[0, 3\): not of this SAE"),
        ("features", {"index": "x"}, "index 'x' not in"),
        ("features", {"index": True}, "index True not in"),
        ("features", {}, "index None not in"),
        ("features", {"index": "0", "maxActApprox": "3"}, "maxActApprox must be a finite number"),
        ("features", '{"index": "0", "frac_nonzero": NaN}', "frac_nonzero must be a finite number"),
        ("explanations", {"index": "0", "description": 3}, "description must be a string"),
        ("activations", {"index": "0"}, "tokens must be a list of strings"),
        ("activations", {"index": "0", "tokens": ["a"], "values": []}, "as many numbers as tokens"),
        ("activations", {"index": "0", "tokens": [], "values": []}, "as many numbers as tokens"),
        ("activations", {"index": "0", "tokens": ["a"], "values": ["b"]}, "finite numbers"),
    ],
)
def test_damaged_row_is_refused_and_nothing_is_written(
    tmp_path: Path, kind: str, row: Any, message: str
) -> None:
    write(tmp_path / kind, "batch-0.jsonl.gz", row)
    out = tmp_path / "features.jsonl"
    out.write_text("what was there before")
    with pytest.raises(SAEError, match=message):
        import_neuronpedia(tmp_path, out, CARD, NORMS)
    assert out.read_text() == "what was there before"


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "features", "batch-0.jsonl.gz", *({"index": "0"} for _ in range(99)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SAEError, match="truncated or damaged"):
        import_neuronpedia(tmp_path, tmp_path / "features.jsonl", CARD, NORMS)


def test_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="not a Neuronpedia export"):
        import_neuronpedia(tmp_path, tmp_path / "features.jsonl", CARD, NORMS)


def test_norms_of_another_sae_are_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="2 decoder norms for d_sae 3"):
        import_neuronpedia(export, tmp_path / "features.jsonl", CARD, [1.0, 1.0])


# Of another SAE

ROW = {"modelId": "gemma-2-2b", "layer": "15-gemmascope-res-16k", "index": "1", "maxActApprox": 8}
ON = "to import it all the same, add --force"


def import_row(tmp_path: Path, card: SAECard = CARD, force: bool = False, **changes: Any) -> Any:
    write(tmp_path / "features", "batch-0.jsonl.gz", ROW | changes)
    norms = [1.0] * card.d_sae
    out = tmp_path / "features.jsonl"
    return import_neuronpedia(tmp_path, out, card, norms, model="google/gemma-2-2b", force=force)


@pytest.mark.parametrize(
    ("changes", "card", "said"),
    [
        ({"modelId": "gpt2-small"}, {}, "of the model 'gpt2-small', the SAE of 'google/gemma-2-2b"),
        ({"modelId": "gemma-2-2b-it"}, {}, "of the model 'gemma-2-2b-it'"),
        ({"layer": "5-res-jb"}, {}, "of layer 5 .'5-res-jb'., the SAE is at blocks.15.hook_resid"),
        ({"layer": 14}, {}, "of layer 14"),
        ({"layer": "15-gemmascope-mlp-16k"}, {}, "of '15-gemmascope-mlp-16k', the SAE is at"),
        ({"layer": "15-gemmascope-transcoder-16k"}, {}, "of '15-gemmascope-transcoder-16k'"),
        ({}, {"hook": "blocks.15.attn.hook_out"}, "the SAE is at blocks.15.attn.hook_out"),
        ({"index": "3"}, {}, r"index '3' not in \[0, 3\): not of this SAE"),
    ],
)
def test_export_of_another_sae_is_refused_unless_told_to_go_on(
    tmp_path: Path, changes: dict[str, Any], card: dict[str, Any], said: str
) -> None:
    other = replace(CARD, reads="", writes=(), **card)
    with pytest.raises(SAEError, match=said) as caught:
        import_row(tmp_path, other, **changes)
    assert str(caught.value).endswith(ON)
    assert not (tmp_path / "features.jsonl").exists()
    kept = 0 if changes.get("index") == "3" else 1
    assert import_row(tmp_path, other, force=True, **changes).features == kept


@pytest.mark.parametrize(
    "changes",
    [{}, {"modelId": None, "layer": None}, {"layer": "15"}, {"layer": "15-res_fs768-jb"}],
)
def test_export_of_this_sae_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert import_row(tmp_path, **changes).features == 1


def test_transcoder_s_export_is_of_a_transcoder(tmp_path: Path) -> None:
    card = replace(
        CARD,
        kind="transcoder",
        hook="blocks.15.hook_mlp_out",
        reads="blocks.15.mlp.hook_in",
        writes=("blocks.15.hook_mlp_out",),
    )
    for layer in ("15-gemmascope-transcoder-16k", "15-clt-hp"):
        assert import_row(tmp_path, card, layer=layer).features == 1
    with pytest.raises(SAEError, match="of '15-gemmascope-mlp-16k', the SAE is at"):
        import_row(tmp_path, card, layer="15-gemmascope-mlp-16k")


@pytest.mark.parametrize(
    ("exported", "model", "equal"),
    [
        ("gpt2-small", "openai-community/gpt2", True),
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B", True),
        ("llama3.1-8b-it", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("llama3-8b-it", "meta-llama/Meta-Llama-3-8B-Instruct", True),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1", True),
        ("gemma-3-1b", "google/gemma-3-1b-pt", True),
        ("qwen3-1.7b", "Qwen/Qwen3-1.7B-Base", False),
        ("gemma-2-2b", "gemma-2-9b", False),
        ("gpt2-small", "gpt2-medium", False),
    ],
)
def test_models_are_compared_by_name_in_either_spelling(
    exported: str, model: str, equal: bool
) -> None:
    assert same(exported, model) is equal


def test_complete_export_of_a_smaller_sae_is_refused(tmp_path: Path) -> None:
    rows = [{"index": str(index), "maxActApprox": 1.0} for index in range(BATCH)]
    write(tmp_path / "features", "batch-0.jsonl.gz", *rows)
    card, out = replace(CARD, d_sae=2 * BATCH), tmp_path / "features.jsonl"
    norms = [1.0] * card.d_sae
    with pytest.raises(SAEError, match="features 0 to 1023, but the SAE has 2048") as caught:
        import_neuronpedia(tmp_path, out, card, norms)
    assert str(caught.value).endswith(ON)
    assert import_neuronpedia(tmp_path, out, card, norms, force=True).features == BATCH
    # One file is a part, and says nothing of the size.
    part = tmp_path / "features" / "batch-0.jsonl.gz"
    assert import_neuronpedia(part, out, card, norms).features == BATCH
