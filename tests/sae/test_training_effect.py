"""How the effect of steering is scored, on answers made up for it."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path

import pytest

from sae.features import FeatureTable
from sae.sae import open_sae
from sae.source import SAEReference
from sae.training.labels import Label, read_labels
from tests.bench.demo_engine import SAE
from tests.bench.steering_answers import Answer, cost
from tests.bench.steering_effect import effect, on_topic, picked, works
from tests.bench.steering_prompts import BEHAVIOURS, REPORT, SELECTION

SHIPPED = sorted(SAE.parent.iterdir())
SEA = Label(1, "the sea", r"\b(sea|ships?)\b")


def answer(text: str, nll: float = 1.0, tokens: int = 10) -> Answer:
    return Answer("question", text, [7] * tokens, [1], nll, None)


def figures(
    on: float, off: float = 0.0, ratio: float = 2.0, repeated: float = 0.0
) -> dict[str, float]:
    return {
        "on_topic": on,
        "on_topic_unsteered": off,
        "perplexity_ratio": ratio,
        "repeated": repeated,
    }


def test_an_answer_is_on_topic_when_its_test_matches_as_often_as_the_label_asks() -> None:
    answers = [answer("The sea, a ship."), answer("The sea."), answer("Ships at SEA"), answer("")]
    assert on_topic(SEA, answers) == 0.5


def test_cost_is_the_ratio_of_perplexities_over_all_tokens() -> None:
    steered = [answer("a", nll=log(2), tokens=30), answer("b", nll=log(16), tokens=10)]
    # 30 tokens at log 2 and 10 at log 16: (30 + 40) / 40 * log 2 on average.
    assert cost(steered, [answer("c", nll=0.0)]) == pytest.approx(2**1.75)
    assert cost(steered, steered) == 1.0


def test_repetition_is_the_share_of_trigrams_seen_before() -> None:
    assert answer("a b c a b c").repeated == 0.25
    assert answer("a b").repeated == 0.0
    assert answer("no no no no no").repeated == pytest.approx(2 / 3)


def test_an_effect_has_all_four_figures() -> None:
    found = effect(SEA, [answer("sea sea sea sea", nll=log(3))], [answer("nothing", nll=0.0)])
    assert found == pytest.approx(figures(1.0, 0.0, ratio=3.0, repeated=0.5))


@pytest.mark.parametrize(
    ("its", "expected"),
    [
        (figures(0.5), True),
        (figures(0.4), False),
        (figures(1.0, off=0.5), False),
        (figures(1.0, ratio=11.0), False),
        (figures(1.0, repeated=0.3), False),
    ],
)
def test_a_feature_works_when_it_is_seen_and_the_text_holds(
    its: dict[str, float], expected: bool
) -> None:
    assert works(its) is expected


def test_the_best_are_picked_and_no_kind_crowds_out_the_others() -> None:
    kinds: Sequence[str] = ("code", "code", "code", "style")
    labels = [Label(i, str(i), "x", kind=kind) for i, kind in enumerate(kinds)]
    its = [figures(0.6), figures(0.9, ratio=3.0), figures(0.9), figures(0.5)]
    assert [label.index for label in picked(labels, its)] == [2, 1, 3]


def test_no_prompt_is_both_for_choosing_and_for_reporting() -> None:
    assert not set(SELECTION) & set(REPORT)
    for behaviour in BEHAVIOURS:
        assert not set(behaviour.contrast) & set(behaviour.held_out)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_every_label_of_a_shipped_sae_can_be_tested_and_is_told_with_its_feature(
    folder: Path,
) -> None:
    labels = read_labels(folder / "labels.jsonl")
    assert len(labels) > 70
    table = FeatureTable.open(folder, open_sae(SAEReference("a", str(folder))).card.d_sae)
    for label in labels:
        assert label.matches("") == 0
        assert table.label(label.index) == label.label


def test_shipped_saes_stay_small() -> None:
    sizes = [path.stat().st_size for folder in SHIPPED for path in folder.iterdir()]
    assert len(SHIPPED) == 2
    assert sum(sizes) <= 40e6
