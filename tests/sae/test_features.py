from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import SAEError
from sae.feature_search import LabelIndex
from sae.features import Example, Feature, FeatureTable

D_SAE = 100


def write(folder: Path, *lines: Any) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "features.jsonl").write_text(text + "\n")
    return folder


@pytest.fixture
def table(tmp_path: Path) -> FeatureTable:
    folder = write(
        tmp_path,
        {"index": 7, "label": "music and jazz", "max_activation": 6.1, "density": 0.003,
         "output_score": 0.25,
         "examples": [{"text": "a jazz band", "activation": 6.0}, {"text": "and all that"}]},
        {"index": 2, "max_activation": 3},
        "",
        {"index": 4, "label": None, "max_activation": None, "density": None, "examples": None},
        {"index": 5, "label": "Musique française", "tokens": ["ignored"], "score": {"a": 1}},
    )  # fmt: skip
    return FeatureTable.open(folder, D_SAE)


def test_feature_says_what_its_line_says(table: FeatureTable) -> None:
    assert table.get(7) == Feature(
        index=7,
        label="music and jazz",
        max_activation=6.1,
        density=0.003,
        output_score=0.25,
        examples=(Example("a jazz band", 6.0), Example("and all that", None)),
    )
    assert table.get(7).to_json() == {
        "feature": 7, "label": "music and jazz", "max_activation": 6.1, "density": 0.003,
        "output_score": 0.25,
    }  # fmt: skip
    assert table.max_activation(2) == 3.0
    assert table.label(5) == "Musique française"


@pytest.mark.parametrize("index", [0, 4, 99])
def test_unknown_parts_are_none(table: FeatureTable, index: int) -> None:
    assert table.get(index) == Feature(index)
    assert table.max_activation(index) is None
    assert table.label(index) is None


@pytest.mark.parametrize("index", [-1, 100])
def test_feature_past_d_sae_is_an_index_error(table: FeatureTable, index: int) -> None:
    for ask in (table.get, table.label, table.max_activation):
        with pytest.raises(IndexError, match=rf"feature {index} not in \[0, 100\)"):
            ask(index)


def test_pages_run_by_index_over_all_features(table: FeatureTable) -> None:
    features, total = table.page(limit=3, offset=6)
    assert [feature.index for feature in features] == [6, 7, 8]
    assert features[1].max_activation == 6.1
    assert features[1].examples == ()
    assert total == D_SAE
    assert table.page(limit=50, offset=90)[0][-1].index == 99
    assert table.page(limit=50, offset=100) == ([], D_SAE)
    assert table.page(limit=50, offset=10**9) == ([], D_SAE)


def test_blank_query_is_a_page(table: FeatureTable) -> None:
    assert table.search("  ", limit=3, offset=6) == table.page(limit=3, offset=6)


def test_search_gives_features_best_first(table: FeatureTable) -> None:
    features, total = table.search("music", limit=10, offset=0)
    # "Musique" does not begin with "music".
    assert ([feature.index for feature in features], total) == ([7], 1)
    features, total = table.search("MUSI", limit=10, offset=0)
    assert ({feature.index for feature in features}, total) == ({5, 7}, 2)


def test_table_without_a_file_knows_nothing(tmp_path: Path) -> None:
    table = FeatureTable.open(tmp_path, D_SAE)
    assert not table.has_labels
    assert not table.has_max_activations
    assert table.get(3) == Feature(3)
    assert table.search("music", 10, 0) == ([], 0)
    assert table.page(2, 0) == ([Feature(0), Feature(1)], D_SAE)


def test_empty_file_knows_nothing(tmp_path: Path) -> None:
    (tmp_path / "features.jsonl").touch()
    table = FeatureTable.open(tmp_path, D_SAE)
    assert not table.has_labels
    assert table.search("a", 10, 0) == ([], 0)


@pytest.mark.parametrize(
    ("line", "labels", "maxima"),
    [
        ({"index": 0, "label": "a", "max_activation": 1}, True, True),
        ({"index": 0, "label": None, "max_activation": 0.5}, False, True),
        ({"index": 0, "label": "", "max_activation": None}, False, False),
        ({"index": 0, "examples": [{"text": '"label": "x", "max_activation": 3'}]}, False, False),
    ],
)
def test_what_there_is_shows_without_reading_the_table(
    tmp_path: Path, line: dict[str, Any], labels: bool, maxima: bool
) -> None:
    table = FeatureTable.open(write(tmp_path, line), D_SAE)
    assert (table.has_labels, table.has_max_activations) == (labels, maxima)


def test_table_of_one_weight_file_among_several_has_its_name(tmp_path: Path) -> None:
    write(tmp_path, {"index": 0, "label": "the folder's"})
    (tmp_path / "layer3.sae.pt.features.jsonl").write_text('{"index": 0, "label": "its own"}\n')
    assert FeatureTable.open(tmp_path / "layer3.sae.pt", D_SAE).label(0) == "its own"
    assert FeatureTable.open(tmp_path / "layer4.sae.pt", D_SAE).label(0) == "the folder's"
    (tmp_path / "layer3.sae.pt").touch()
    assert FeatureTable.open(tmp_path, D_SAE).label(0) == "its own"
    inside = tmp_path / "checkpoints" / "final.safetensors"
    assert FeatureTable.open(inside, D_SAE).label(0) == "the folder's"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected an object"),
        ({}, "index None not in"),
        ({"index": 100}, r"index 100 not in \[0, 100\)"),
        ({"index": -1}, "index -1 not in"),
        ({"index": True}, "index True not in"),
        ({"index": "3"}, "index '3' not in"),
        ({"index": 3, "label": 4}, "label must be a string or null"),
        ({"index": 3, "max_activation": "6"}, "max_activation must be a finite number, got '6'"),
        ('{"index": 3, "max_activation": NaN}', "max_activation must be a finite number, got nan"),
        ('{"index": 3, "density": 1e999}', "density must be a finite number, got inf"),
        ({"index": 3, "density": 10**400}, "density must be a finite number, got 1000"),
        ({"index": 3, "examples": {}}, "examples must be a list"),
        ({"index": 3, "examples": ["text"]}, "an example must be an object with a text"),
        ({"index": 0}, "feature 0 is listed twice"),
    ],
)
def test_damaged_line_is_refused_with_its_number(tmp_path: Path, line: Any, message: str) -> None:
    table = FeatureTable.open(write(tmp_path, {"index": 0}, line), D_SAE)
    with pytest.raises(SAEError, match=rf"features\.jsonl line 2: {message}"):
        table.load()


def test_threads_read_one_table(table: FeatureTable) -> None:
    found: list[Any] = []

    def ask() -> None:
        found.append((table.search("music", 5, 0), table.get(7)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(answer == found[0] for answer in found)


# Search

LABELS = {
    1: "references to music",
    2: "musical instruments",
    3: "music, music theory and music history in long labels about several other things",
    4: "jazz music",
    5: "Größe und Maß",
    6: "naïve résumé",
    7: "日本語の文字",
    8: "C++ code (templates)",
    9: "dogs and cats",
}


@pytest.fixture(scope="module")
def index() -> LabelIndex:
    return LabelIndex(LABELS.items())


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("jazz", [4]),
        ("jazz music", [4]),
        ("music jazz", [4]),
        ("mus ja", [4]),
        ("instr", [2]),
        ("NAIVE", [6]),
        ("resume", [6]),
        ("größe", [5]),
        ("grosse", [5]),
        ("文字", [7]),
        ("日本", [7]),
        ("c++", [8, 9]),
        ("plates", [8]),
        ("nothing like it", []),
        ("dogs", [9]),
    ],
)
def test_query_finds_labels(index: LabelIndex, query: str, expected: list[int]) -> None:
    found, total = index.search(query, 10, 0)
    assert found == expected
    assert total == len(expected)


def test_whole_words_rank_before_beginnings(index: LabelIndex) -> None:
    found, total = index.search("music", 10, 0)
    assert total == 4
    assert found[-1] == 2


def test_labels_with_all_words_are_preferred_to_labels_with_any(index: LabelIndex) -> None:
    assert index.search("jazz references", 10, 0)[0] == [4, 1]
    assert index.search("references music", 10, 0) == ([1], 1)


def test_equal_scores_rank_by_index() -> None:
    index = LabelIndex([(9, "a b"), (3, "a b"), (5, "a b")])
    assert index.search("b", 10, 0)[0] == [3, 5, 9]


def test_pages_of_a_search_join_to_the_whole(index: LabelIndex) -> None:
    whole, total = index.search("a", 100, 0)
    parts = [index.search("a", 2, offset)[0] for offset in range(0, total + 2, 2)]
    assert [feature for part in parts for feature in part] == whole


@settings(max_examples=300, deadline=None)
@given(query=st.text(max_size=40))
def test_any_query_is_words_and_nothing_else(query: str) -> None:
    found, total = LabelIndex(LABELS.items()).search(query, 3, 0)
    assert len(found) == min(3, total)
    assert set(found) <= set(LABELS)


@pytest.mark.parametrize(
    "query",
    ['"', "'", "music*", "label:music", "NEAR(a b)", "a AND OR NOT", "'; DROP TABLE labels; --",
     "%", "_", "(", "\x00", "\ud800", "a" * 10**6, "a " * 10**5],
)  # fmt: skip
def test_query_that_would_be_syntax_elsewhere_does_no_harm(index: LabelIndex, query: str) -> None:
    index.search(query, 10, 0)
    assert index.search("jazz", 10, 0) == ([4], 1)


@pytest.mark.parametrize("content", [None, "", '{"index": 1, "examples": [{"text": "b"}]}\n', "{"])
def test_examples_that_are_gone_are_left_out(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "features.jsonl"
    path.write_text('{"index": 0, "label": "a", "examples": [{"text": "b"}]}\n')
    table = FeatureTable(path, 4)
    assert table.get(0).examples == (Example("b"),)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert table.get(0) == Feature(0, label="a")


@pytest.mark.parametrize(
    ("order", "first"),
    [
        ("max_activation", [7, 2, 0]),
        ("density", [3, 7, 2]),
        ("output_score", [1, 3, 2]),
    ],
)
def test_order_is_highest_first_with_unknown_last_and_ties_by_index(
    tmp_path: Path, order: str, first: list[int]
) -> None:
    write(
        tmp_path,
        {"index": 7, "label": "tea", "max_activation": 6.1, "density": 0.2},
        {"index": 1, "label": "tea", "output_score": 0.9},
        {"index": 2, "label": "tea", "max_activation": 3, "density": 0, "output_score": -0.5},
        {"index": 3, "label": "tea", "density": 0.3, "output_score": 0},
    )
    features = FeatureTable.open(tmp_path, 8)
    page, total = features.page(3, 0, order=order)
    assert ([f.index for f in page], total) == (first, 8)
    # All 8, each once.
    whole = [f.index for part in (0, 3, 6) for f in features.page(3, part, order=order)[0]]
    assert sorted(whole) == [*range(8)]
    unknown = [i for i in whole if getattr(features.get(i), order) is None]
    assert whole[-len(unknown) :] == sorted(unknown)


def test_order_of_a_search_is_of_what_matches(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"index": 1, "label": "tea"},
        {"index": 2, "label": "tea and biscuits", "density": 0.1},
        {"index": 3, "label": "coffee", "density": 0.9},
        {"index": 5, "label": "green tea", "density": 0.4},
    )
    features = FeatureTable.open(tmp_path, 8)
    found, total = features.search("tea", 2, 0, order="density")
    assert ([f.index for f in found], total) == ([5, 2], 3)
    assert [f.index for f in features.search("tea", 2, 2, order="density")[0]] == [1]


def test_output_score_must_be_a_number(tmp_path: Path) -> None:
    write(tmp_path, {"index": 1, "output_score": "high"})
    with pytest.raises(SAEError, match="output_score must be a finite number, got 'high'"):
        FeatureTable.open(tmp_path, 8).load()
