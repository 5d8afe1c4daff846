"""How an evaluation's figures are put together over texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steering.report import Report
from steering.studies.evaluation import Evaluated, edits_of, share_of
from steering.studies.figures import Figures

A, B = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"


def entry(sae: str, feature: int, edited: int, mean: float | None, **more: Any) -> dict[str, Any]:
    return {
        "sae": sae,
        "feature": feature,
        "op": "clamp",
        "value": 2.0,
        "effective_value": 2.0,
        "tokens_edited": edited,
        "tokens_skipped": 1,
        "tokens_active": edited // 2,
        "mean_activation": mean,
        "max_activation": None if mean is None else 2 * mean,
        **more,
    }


def hook(name: str, tokens: int, mean: float | None, largest: float | None) -> dict[str, Any]:
    found = {"hook": name, "tokens": tokens, "mean_share": mean, "max_share": largest}
    return {**found, "tokens_limited": 0}


def writes(sae: str) -> tuple[str, ...]:
    return {"a": (A,), "b": (B,), "both": (A, B)}[sae]


def report(entries: list[dict[str, Any]], *hooks: dict[str, Any]) -> Report:
    return Report(entries, 0, edited=list(hooks))


def test_entries_of_several_texts_become_one() -> None:
    reports = [
        report([entry("a", 3, 4, 1.0), entry("b", 5, 0, None)]),
        report([entry("a", 3, 12, 3.0), entry("b", 5, 2, 7.0)]),
        report([entry("a", 3, 0, None), entry("b", 5, 0, None)]),
    ]
    first, second = edits_of(reports)
    assert first == entry("a", 3, 16, 2.5, tokens_skipped=3, max_activation=6.0)
    assert (second["tokens_edited"], second["mean_activation"]) == (2, 7.0)
    assert edits_of([]) == []


def test_edit_of_no_token_has_no_activation() -> None:
    (found,) = edits_of([report([entry("a", 3, 0, None)])] * 2)
    assert (found["mean_activation"], found["max_activation"]) == (None, None)


def test_share_is_a_mean_over_tokens_and_hook_points() -> None:
    reports = [
        report([entry("both", 3, 4, 1.0)], hook(A, 4, 0.1, 0.3), hook(B, 4, 0.2, 0.25)),
        report([entry("both", 3, 2, 1.0)], hook(A, 2, 0.4, 0.5), hook(B, 2, 0.0, 0.0)),
    ]
    found = share_of(reports, writes)
    assert found == {"mean": pytest.approx((0.4 + 0.8 + 0.8) / 12), "max": 0.5}


def test_tokens_that_a_condition_held_back_have_a_share_of_nothing() -> None:
    some = entry("a", 3, 2, 1.0, tokens_held_back=6)
    assert share_of([report([some], hook(A, 2, 0.4, 0.5))], writes) == {
        "mean": pytest.approx(0.1),
        "max": 0.5,
    }
    # Edits of the same tokens, each where its own condition holds.
    other = entry("a", 4, 5, 1.0, tokens_held_back=3)
    assert share_of([report([some, other], hook(A, 7, 0.4, 0.5))], writes) == {
        "mean": pytest.approx(0.35),
        "max": 0.5,
    }
    nowhere = entry("b", 3, 0, None, tokens_held_back=4)
    assert share_of([report([nowhere])], writes) == {"mean": 0, "max": 0}


def test_share_of_no_token_is_none() -> None:
    assert share_of([report([entry("a", 3, 0, None)])], writes) is None
    assert share_of([], writes) is None


def test_share_of_a_stream_that_left_its_dtype_is_not_known() -> None:
    reports = [report([entry("a", 3, 1, 1.0)], hook(A, 1, None, None))]
    assert share_of(reports, writes) == {"mean": None, "max": None}


def figures(kl: list[float], unsteered: list[float], steered: list[float]) -> Figures:
    n = len(kl)
    zeros = np.zeros(n)
    ids = np.zeros(n, np.int64)
    none = np.zeros((n, 0))
    columns = (np.array(kl), zeros, np.array(unsteered), np.array(steered))
    return Figures(*columns, ids, ids, zeros, zeros, none, none, none.astype(np.int64))


def test_means_are_over_all_positions_of_all_texts_and_not_over_texts() -> None:
    one = Evaluated("a")
    one.put(1, None, (7,), figures([4.0], [-1.0], [-5.0]))
    one.put(0, None, (8, 9, 5), figures([0.0, 0.0, 0.0], [-1.0] * 3, [-1.0] * 3))
    found = one.to_json(2, [], writes, lambda ids: f"<{ids[0]}>")
    assert found["tokens"] == 4
    assert found["kl"] == {"mean": 1.0, "max": 4.0, "sum": 4.0}
    assert found["nll"] == {"unsteered": 1.0, "steered": 2.0}
    assert found["top1_agreement"] == 1.0
    assert [len(text["tokens"]) for text in found["detail"]] == [3, 1]
    last = {"id": 7, "text": "<7>", "kl": 4.0, "unsteered": -1.0, "steered": -5.0}
    assert found["detail"][1]["tokens"] == [last]
    assert (found["share"], found["edits"], found["interactions"]) == (None, [], None)


def test_figure_that_json_cannot_hold_is_null() -> None:
    one = Evaluated("a")
    one.put(0, None, (7,), figures([np.inf], [-1.0], [-np.inf]))
    found = one.to_json(1, [], writes, lambda ids: "")
    assert found["kl"] == {"mean": None, "max": None, "sum": None}
    assert found["detail"][0]["tokens"][0]["steered"] is None
