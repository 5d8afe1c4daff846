"""Figures of two distributions, against the definitions in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.request.keep import Keep
from steering.studies.figures import Figures
from steering.worker import scores
from steering.worker.captures import Captures
from steering.worker.scored_texts import ScoredTexts
from steering.worker.scores import Scores, SteeredSide

VOCABULARY, D = 50, 8
CPU = torch.device("cpu")


class Head:
    """A linear head that keeps how many rows each call had."""

    def __init__(self, W: Tensor) -> None:
        self.W = W
        self.calls: list[int] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        self.calls.append(len(hidden))
        return hidden.to(self.W.dtype) @ self.W


def weights(seed: int = 0) -> Tensor:
    return torch.randn(D, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def hidden(seed: int, n: int) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def captures(**texts: Tensor) -> Captures:
    """Five rows of each text are asked for, and as many are kept as there are."""
    kept = Captures()
    for key, rows in texts.items():
        kept.open(key, Keep(key, 0, 5))
        kept.begin([key], np.array([0, len(rows)]), lambda key=key: {key: 0})  # type: ignore[misc]
        kept.put(rows)
        kept.end()
    return kept


def made(head: Head, block: int | None = None, reduced: int | None = None) -> Scores:
    found = Scores(head, VOCABULARY, CPU)
    if block is not None:
        found._block = block
    if reduced is not None:
        found._reduced = reduced
    return found


def reference(
    W: Tensor, u: Tensor, s: Tensor, targets: Sequence[int], ids: Sequence[int]
) -> dict[str, Any]:
    return definitions(u.double() @ W.double(), s.double() @ W.double(), targets, ids)


def definitions(
    before: Tensor, after: Tensor, targets: Sequence[int], ids: Sequence[int]
) -> dict[str, Any]:
    """The figures of ``[n, vocabulary]`` logits, in float64."""
    log_p, log_q = (logits.double().log_softmax(-1).numpy() for logits in (before, after))
    rows = np.arange(len(targets))
    return {
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1),
        "reverse_kl": (np.exp(log_q) * (log_q - log_p)).sum(-1),
        "unsteered": log_p[rows, targets],
        "steered": log_q[rows, targets],
        "top_unsteered": log_p.argmax(-1),
        "top_steered": log_q.argmax(-1),
        "confidence_unsteered": log_p.max(-1),
        "confidence_steered": log_q.max(-1),
        "watched_unsteered": log_p[:, list(ids)],
        "watched_steered": log_q[:, list(ids)],
        "ranks_steered": (log_q[:, None, :] > log_q[:, list(ids), None]).sum(-1),
    }


@pytest.mark.parametrize(("block", "reduced"), [(1000, 1000), (1000, 3), (4, 3), (1, 1)])
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("chunk", [128, 10, 16])
def test_figures_are_their_definitions_whatever_the_blocks(
    n: int, block: int, reduced: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "CHUNK", chunk)
    W, u = weights(), hidden(1, n)
    sides = [SteeredSide(u + 0.3 * hidden(2 + i, n), [4, 9, 30][: i % 4]) for i in range(6)]
    targets = list(range(5, 5 + n))
    found = made(Head(W), block, reduced).compare(u, sides, targets)
    assert found is not None
    for side, columns in zip(sides, found, strict=True):
        for name, value in reference(W, u, side.hidden, targets, side.watched).items():
            np.testing.assert_allclose(columns[name].numpy(), value, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("n", "texts", "block", "calls"),
    [
        (2, 40, 64, [64, 20]),  # the unsteered text in each
        (5, 2, 3, [3] * 5),
        (5, 2, 10, [6, 9]),
        (3, 40, 17, [17, 17, 9] * 3),
        (2, 2, 1, [2] * 4),  # less than a row of two texts takes no room
    ],
)
def test_calls_of_the_head_have_the_same_rows_of_all_texts_that_fit_and_of_the_unsteered_one(
    n: int, texts: int, block: int, calls: list[int]
) -> None:
    head = Head(weights())
    sides = [SteeredSide(hidden(2 + i, n)) for i in range(texts)]
    made(head, block=block).compare(hidden(1, n), sides, range(n))
    assert head.calls == calls


@pytest.mark.parametrize("chunk", [4, 7, 128])
@pytest.mark.parametrize("v", [3, 28, 30])
def test_first_of_the_likeliest_tokens_is_found_wherever_it_is(
    v: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "CHUNK", chunk)
    others = torch.arange(v).remainder(3) / 4
    rows = [others.masked_fill(torch.arange(v) == i, 2.0) for i in range(v)]
    tied = [row.index_fill(0, torch.tensor([v // 2, v - 1]), 2.0) for row in rows]
    z = torch.stack([*rows, *tied, torch.full((v,), -scores.LARGEST)])
    first = [row.tolist().index(max(row.tolist())) for row in z]
    assert scores._argmax(z)[:, 0].tolist() == first


def test_equal_texts_do_not_diverge_at_all_even_in_bfloat16() -> None:
    W, u = weights().bfloat16(), hidden(1, 5).bfloat16()
    found = made(Head(W)).compare(u, [SteeredSide(u)], range(5))
    assert found is not None
    assert torch.equal(found[0]["kl"], torch.zeros(5))
    assert torch.equal(found[0]["reverse_kl"], torch.zeros(5))


def test_divergence_of_nearly_equal_texts_is_right_and_never_below_zero() -> None:
    W, u = weights(), hidden(1, 200)
    side = SteeredSide(u + 1e-3 * hidden(2, 200))
    targets = [i % VOCABULARY for i in range(200)]
    found = made(Head(W)).compare(u, [side], targets)
    assert found is not None
    right = reference(W, u, side.hidden, targets, ())["kl"]
    assert right.max() < 1e-4
    assert (found[0]["kl"] >= 0).all() and (found[0]["reverse_kl"] >= 0).all()
    np.testing.assert_allclose(found[0]["kl"].numpy(), right, atol=3e-7)


def test_digits_survive_a_whole_vocabulary_and_a_large_divergence() -> None:
    """The sum that softmax divides by is not exact: it loses some of many small terms."""
    v = 2**17
    z = torch.randn(2, v, generator=torch.Generator().manual_seed(0)) * 3
    logits = torch.cat([z, z.roll(1, -1)])
    head = Scores(lambda rows: logits[rows[:, 0].long()], v, CPU)
    rows = torch.arange(4.0)[:, None]
    found = head.compare(rows[:2], [SteeredSide(rows[2:])], [5, 6])
    assert found is not None
    right = definitions(logits[:2], logits[2:], [5, 6], ())
    assert right["kl"].min() > 8
    for name in ("kl", "reverse_kl", "confidence_unsteered", "confidence_steered", "steered"):
        np.testing.assert_allclose(found[0][name].numpy(), right[name], rtol=3e-7, err_msg=name)


def test_tokens_that_the_model_rules_out_count_nothing() -> None:
    mask = torch.zeros(VOCABULARY).masked_fill(torch.arange(VOCABULARY) >= 40, -torch.inf)
    W, u, s = weights(), hidden(1, 3), hidden(2, 3)
    masked = Scores(lambda x: x @ W + mask, VOCABULARY, CPU)
    found = masked.compare(u, [SteeredSide(s)], [1, 2, 3])
    assert found is not None
    right = reference(W[:, :40], u, s, [1, 2, 3], ())
    np.testing.assert_allclose(found[0]["kl"].numpy(), right["kl"], atol=2e-6)
    np.testing.assert_allclose(found[0]["reverse_kl"].numpy(), right["reverse_kl"], atol=2e-6)


def test_stream_that_left_its_dtype_gives_numbers() -> None:
    W, u = weights(), hidden(1, 2)
    s = hidden(2, 2)
    s[0] = torch.nan
    s[1] = torch.inf
    found = made(Head(W)).compare(u, [SteeredSide(s, [3])], [1, 2])
    assert found is not None
    assert all(column.double().isfinite().all() for column in found[0].values())
    # A row of nothing but NaN is an even distribution.
    assert found[0]["steered"][0] == pytest.approx(-np.log(VOCABULARY))


@pytest.mark.parametrize("steered", [True, False])
@pytest.mark.parametrize("token", [0, 40, VOCABULARY - 1])
@pytest.mark.parametrize(
    ("value", "counts_as"),
    [(torch.nan, 0.0), (torch.inf, scores.LARGEST), (-torch.inf, -scores.LARGEST)],
)
def test_single_logit_that_is_no_number_counts_as_one_and_rows_beside_it_keep_their_figures(
    value: float, counts_as: float, token: int, steered: bool
) -> None:
    logits = torch.stack([hidden(i, 50)[:, 0] for i in range(10)])  # [10, VOCABULARY]
    row = 7 if steered else 2

    def figures(at_row: float) -> dict[str, Tensor]:
        changed = logits.clone()
        changed[row, token] = at_row
        head = Scores(lambda rows: changed[rows[:, 0].long()], VOCABULARY, CPU)
        rows = torch.arange(10.0)[:, None]
        found = head.compare(rows[:5], [SteeredSide(rows[5:], [token, 3])], range(5))
        assert found is not None
        return found[0]

    found, right, before = figures(value), figures(counts_as), figures(0.5)
    for name, column in found.items():
        assert torch.equal(column, right[name]), name
        assert column.double().isfinite().all()
        others = torch.arange(5) != 2
        assert torch.equal(column[others], before[name][others]), name


def test_log_probabilities_are_those_of_the_comparison() -> None:
    W, u = weights(), hidden(1, 9)
    targets = [3 * i for i in range(9)]
    found = made(Head(W), block=4, reduced=3).log_probabilities(u, targets)
    assert found is not None
    right = reference(W, u, u, targets, ())["unsteered"]
    np.testing.assert_allclose(found.numpy(), right, atol=2e-6)


def test_rank_that_reports_nothing_calls_the_head_as_often() -> None:
    W, u = weights(), hidden(1, 7)
    sides = [SteeredSide(hidden(2 + i, 7)) for i in range(3)]
    reports, silent = Head(W), Head(W)
    for head, flag in ((reports, True), (silent, False)):
        found = Scores(head, VOCABULARY, CPU, reports=flag)
        found._block = 4
        assert (found.compare(u, sides, range(7)) is None) is not flag
        assert (found.log_probabilities(u, range(7)) is None) is not flag
    assert silent.calls == reports.calls


def test_rank_without_logits_has_no_figures() -> None:
    silent = Scores(lambda _: None, VOCABULARY, CPU)
    assert silent.compare(hidden(1, 3), [SteeredSide(hidden(2, 3))], range(3)) is None
    assert silent.log_probabilities(hidden(1, 3), range(3)) is None


def test_blocks_are_bounded_whatever_the_vocabulary() -> None:
    assert Scores(Head(weights()), 2 * scores.MAX_BLOCK, CPU)._block == 1
    assert Scores(Head(weights()), 200_000, CPU)._block * 200_000 <= scores.MAX_BLOCK
    assert Scores(Head(weights()), 50_000, CPU)._block == scores.MAX_CPU_ROWS


def test_figures_survive_their_way_to_the_front_end_in_parts() -> None:
    W, u = weights(), hidden(1, 5)
    side = SteeredSide(hidden(2, 5), [7, 8])
    whole = made(Head(W)).compare(u, [side], range(5))
    assert whole is not None
    kept = ScoredTexts(captures(before=u, after=side.hidden), made(Head(W)))
    parts = []
    for start, stop in ((0, 2), (2, 5)):
        found = kept.compare("before", [("after", [7, 8])], [*range(start, stop)], start, stop)
        assert found is not None and found[0] is not None
        parts.append(found[0])
    figures = Figures.of(parts, None)
    for name, column in whole[0].items():
        np.testing.assert_allclose(getattr(figures, name), column.numpy(), atol=2e-6)


def test_text_that_is_not_whole_has_no_figures_and_those_beside_it_do() -> None:
    W, u, v = weights(), hidden(1, 5), hidden(2, 5)
    rows = captures(before=u, after=v, short=v[:3])
    kept = ScoredTexts(rows, made(Head(W)))
    sides: list[tuple[str, list[int]]] = [("short", []), ("after", []), ("nobody", [])]
    figures = kept.compare("before", sides, [*range(5)], 0, 5)
    assert figures is not None
    assert figures[0] is figures[2] is None
    alone = made(Head(W)).compare(u, [SteeredSide(v)], range(5))
    assert alone is not None and figures[1] is not None
    assert figures[1]["kl"] == alone[0]["kl"].numpy().tobytes()
    assert kept.compare("short", sides, [], 0, 5) is None

    found = kept.log_probabilities([("short", 0, [1, 2]), ("after", 2, [3, 4]), ("nobody", 0, [5])])
    assert found is not None
    assert found[0] is found[2] is None
    wanted = made(Head(W)).log_probabilities(v[2:4], [3, 4])
    assert wanted is not None and found[1] is not None
    np.testing.assert_allclose(np.frombuffer(found[1], np.float32), wanted.numpy(), atol=2e-6)
    assert kept.log_probabilities([("short", 0, [1])]) is None
