"""The notebook runs from top to bottom, and shows what its stored outputs show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.notebook import run

NOTEBOOK = Path(__file__).parents[2] / "server" / "offline.ipynb"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


@pytest.fixture(scope="module")
def executed(
    cells: list[dict[str, Any]], demo_model: Path
) -> Iterator[tuple[dict[str, Any], list[list[dict[str, Any]]]]]:
    """What the cells leave behind, and what each of them puts out."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        yield namespace, list(run(cells, namespace))
    finally:
        if "llm" in namespace:
            namespace["llm"].llm_engine.engine_core.shutdown()


def kinds(outputs: list[dict[str, Any]]) -> list[str]:
    return [output["output_type"] for output in outputs]


def test_every_cell_puts_out_what_is_stored(
    cells: list[dict[str, Any]], executed: tuple[dict[str, Any], list[list[dict[str, Any]]]]
) -> None:
    stored = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    assert list(map(kinds, executed[1])) == list(map(kinds, stored))
    # The second cell's answers are greedy and in float32.
    assert executed[1][1][0]["text"] == "".join(stored[1][0]["text"])


def test_read_has_features_on_every_token_but_the_first(
    executed: tuple[dict[str, Any], list[list[dict[str, Any]]]],
) -> None:
    namespace, _ = executed
    assert namespace["heat"].shape == (10, len(namespace["tokens"]))
    assert namespace["tokens"][0]["position"] == 1
    assert (namespace["heat"] > 0).any(axis=1).all()


def test_more_of_the_feature_favours_what_it_is_about(
    executed: tuple[dict[str, Any], list[list[dict[str, Any]]]],
) -> None:
    curves = executed[0]["curves"]
    favoured = [a - b for a, b in zip(curves["music"], curves["no music"], strict=True)]
    assert favoured == sorted(favoured)
    assert favoured[-1] > 3.0


def test_notebook_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 200_000
