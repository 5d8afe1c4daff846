"""What scoring says of texts on a real engine, against transformers with hooks in float32."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.studies import scoring
from steering.studies.comparison import Comparison, Side
from steering.studies.figures import Figures
from steering.studies.kept_runs import Held
from steering.studies.scoring import Baseline
from steering.vllm.reader import Finished, Run
from tests.engine.outputs import tokens
from tests.engine.scored import TOLERANCE, WATCHED, Scored, scored_engine

FIELDS: tuple[dict[str, Any], ...] = (
    {"interventions": [{"sae": "a", "feature": 3, "op": "clamp", "value": 6}]},
    {
        "interventions": [
            {"sae": "a", "feature": 5, "op": "add", "value": 4},
            {"sae": "b", "feature": 9, "op": "scale", "value": 3},
        ],
        "positions": {"prompt": False},
    },
    {
        "interventions": [
            {"sae": "b", "feature": 7, "op": "add", "value": -5, "positions": {"start": -4}}
        ],
        "max_share": 0.2,
    },
)
PROMPT, COMPLETION = tuple(tokens(1, 40)), tuple(tokens(2, 31)[1:])


def expected(before: Tensor, after: Tensor, ids: Sequence[int]) -> dict[str, Any]:
    """The figures of two ``[n, vocabulary]`` log distributions, and of the tokens behind them."""
    at = torch.tensor(list(ids))[:, None]
    watched = after[:, list(WATCHED)]
    return {
        "kl": (before.exp() * (before - after)).sum(-1),
        "reverse_kl": (after.exp() * (after - before)).sum(-1),
        "unsteered": before.gather(1, at)[:, 0],
        "steered": after.gather(1, at)[:, 0],
        "confidence_unsteered": before.max(-1).values,
        "confidence_steered": after.max(-1).values,
        "watched_unsteered": before[:, list(WATCHED)],
        "watched_steered": watched,
    }


def agrees(figures: Figures, before: Tensor, after: Tensor, ids: Sequence[int]) -> None:
    for name, value in expected(before, after, ids).items():
        np.testing.assert_allclose(
            getattr(figures, name), value.numpy(), atol=TOLERANCE, err_msg=name
        )
    # Where logits are nearer to each other than rounding, any order is right.
    for top, log_p in ((figures.top_unsteered, before), (figures.top_steered, after)):
        assert (
            log_p.max(-1).values - log_p.gather(1, torch.tensor(top)[:, None])[:, 0] < 1e-4
        ).all()
    for j, ranks in enumerate(figures.ranks_steered.T):
        own = after[:, WATCHED[j], None]
        most, least = ((after > own + margin).sum(-1).numpy() for margin in (-1e-4, 1e-4))
        assert ((least <= ranks) & (ranks <= most)).all()


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scored]:
    """Prompts come in chunks of 24 tokens, so that no text is computed in one pass."""
    folder = tmp_path_factory.mktemp("scoring")
    with scored_engine(folder, max_num_batched_tokens=24, max_num_seqs=8) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(scored: Scored) -> Iterator[None]:
    yield
    assert scored.held == 0


def test_steered_completion_has_the_figures_of_transformers_with_hooks(scored: Scored) -> None:
    unsteered = Side(PROMPT, COMPLETION)
    found = scored.compared(Comparison(unsteered, scored.sides(FIELDS, PROMPT, COMPLETION)))
    before = scored.reference(PROMPT, COMPLETION, None)
    for figures, field in zip(found, FIELDS, strict=True):
        assert len(figures.kl) == len(COMPLETION)
        assert figures.kl.max() > 1e-3
        agrees(figures, before, scored.reference(PROMPT, COMPLETION, field), COMPLETION)


def test_text_without_completion_is_scored_behind_its_first_token(scored: Scored) -> None:
    found = scored.compared(Comparison(Side(PROMPT), scored.sides(FIELDS[:1], PROMPT, ())))
    before, after = (scored.reference(PROMPT[:1], PROMPT[1:], field) for field in (None, FIELDS[0]))
    agrees(found[0], before, after, PROMPT[1:])


def test_what_follows_a_text_is_told_of_its_last_token_alone(scored: Scored) -> None:
    comparison = Comparison(Side(PROMPT), scored.sides(FIELDS, PROMPT, ()), after_last=True)
    before = scored.reference(PROMPT, [0], None)
    for figures, field in zip(scored.compared(comparison), FIELDS, strict=True):
        assert figures.kl.shape == (1,)
        assert np.isnan(figures.steered).all()
        after = scored.reference(PROMPT, [0], field)
        figures.unsteered[:], figures.steered[:] = before[0, 0], after[0, 0]
        agrees(figures, before, after, [0])


def test_sides_may_have_other_prompts_before_the_same_completion(scored: Scored) -> None:
    other = tuple(tokens(3, 17))
    comparison = Comparison(Side(PROMPT, COMPLETION), [(Side(other, COMPLETION), WATCHED)])
    (figures,) = scored.compared(comparison)
    before, after = (scored.reference(prompt, COMPLETION, None) for prompt in (PROMPT, other))
    agrees(figures, before, after, COMPLETION)


def test_text_beside_itself_has_no_divergence_at_all(scored: Scored) -> None:
    same = Side(PROMPT, COMPLETION, None)
    (figures,) = scored.compared(Comparison(same, [(same, ())]))
    assert (figures.kl < 1e-9).all() and (figures.kl >= 0).all()
    assert (figures.reverse_kl < 1e-9).all() and (figures.reverse_kl >= 0).all()
    assert figures.watched_steered.shape == (len(COMPLETION), 0)
    assert figures.report is None


def test_many_texts_of_many_lengths_are_not_mixed_up(
    scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Groups, calls and blocks of a few rows each.
    monkeypatch.setattr("steering.studies.kept_runs.MAX_HELD_ROWS", 40)
    monkeypatch.setattr(scoring, "MAX_CALL_ROWS", 16)
    monkeypatch.setattr(scored.engine.worker._scored.scores, "_block", 5)
    monkeypatch.setattr(scored.engine.worker._scored.scores, "_reduced", 2)
    texts = [(tuple(tokens(20 + i, 3 + 7 * i)), COMPLETION[: 1 + 5 * i]) for i in range(5)]
    found = scored.all_compared(
        [Comparison(Side(*text), scored.sides(FIELDS[:2], *text)) for text in texts]
    )
    for of_text, (prompt, text) in zip(found, texts, strict=True):
        before = scored.reference(prompt, text, None)
        for figures, field in zip(of_text, FIELDS[:2], strict=True):
            agrees(figures, before, scored.reference(prompt, text, field), text)


@pytest.mark.parametrize("held_rows", [2**14, 35])
def test_unsteered_text_that_stays_runs_once_for_edits_compared_one_after_another(
    scored: Scored, monkeypatch: pytest.MonkeyPatch, held_rows: int
) -> None:
    """With 35 rows the first text stays, whose 30 are scored, and the second does not."""
    monkeypatch.setattr(scoring, "MAX_HELD_ROWS", held_rows)
    sides = [Side(PROMPT, COMPLETION), Side(tuple(tokens(9, 20)))]
    edits = [edit for field in FIELDS if (edit := scored.accepted(field)) is not None]
    ran: list[int] = []
    each = scored.reader.each

    def counted(runs: Iterable[Run]) -> AsyncGenerator[tuple[int, Finished], None]:
        made = list(runs)
        ran.append(len(made))
        return each(made)

    monkeypatch.setattr(scored.reader, "each", counted)
    baseline = Baseline(scored.reader, sides)

    async def run() -> list[dict[int, Figures]]:
        found = []
        async with Held(scored.reader) as held:
            for edit in edits:
                async with aclosing(baseline.compare(edit, held)) as compared:
                    found.append({place: figures async for place, figures in compared})
                assert scored.held == (1 if held_rows == 35 else 2)
        return found

    found = asyncio.run(run())
    assert sum(ran) == (3 * 2 + (4 if held_rows == 35 else 2))
    lengths = [len(PROMPT) + len(COMPLETION), len(sides[1].prompt)]
    assert baseline.tokens(3) == 4 * lengths[0] + (6 if held_rows == 35 else 4) * lengths[1]
    alone = scored.all_compared(
        [Comparison(side, [(replace(side, accepted=edit), ()) for edit in edits]) for side in sides]
    )
    for i in range(len(edits)):
        for place in range(len(sides)):
            for name in ("kl", "reverse_kl", "unsteered", "steered"):
                np.testing.assert_allclose(
                    getattr(found[i][place], name), getattr(alone[place][i], name), atol=TOLERANCE
                )


def test_log_probabilities_of_texts_are_those_of_transformers(
    scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MAX_CALL_ROWS", 16)
    texts = [(tuple(tokens(30 + i, 9)), COMPLETION[: 4 + 9 * i]) for i in range(3)]
    fields = (None, *FIELDS[:2])
    sides = [Side(*text, scored.accepted(field)) for text, field in zip(texts, fields, strict=True)]
    done: list[int] = []
    found = asyncio.run(scored.scorer.log_probabilities(sides, lambda: done.append(1)))
    assert len(done) == 3
    for log_p, (prompt, text), field in zip(found, texts, fields, strict=True):
        every = scored.reference(prompt, text, field)
        expected = every.gather(1, torch.tensor(text)[:, None])[:, 0]
        np.testing.assert_allclose(log_p, expected.numpy(), atol=TOLERANCE)


def test_report_of_a_steered_side_counts_what_entered_the_model(scored: Scored) -> None:
    sides = scored.sides([{**FIELDS[0], "report": True}], PROMPT, COMPLETION)
    (figures,) = scored.compared(Comparison(Side(PROMPT, COMPLETION), sides))
    assert figures.report is not None
    # All but the first token and the last.
    edited = len(PROMPT) + len(COMPLETION) - 2
    assert figures.report.interventions[0]["tokens_edited"] == edited
    assert figures.report.tokens_cached == 0


def test_preempted_text_is_scored_as_one_that_was_not(
    scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, preempted = scored.engine.llm.llm_engine, 0
    step, scheduler = engine.step, scored.engine.scheduler
    preempt = scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal preempted
        preempted += 1
        return preempt(*args, **kwargs)

    steps = 0

    def stepped() -> Any:
        nonlocal steps
        steps += 1
        if steps in (2, 5, 6):
            scheduler.reset_prefix_cache(reset_running_requests=True)
        return step()

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    monkeypatch.setattr(engine, "step", stepped)
    sides = scored.sides(FIELDS[:2], PROMPT, COMPLETION)
    found = scored.compared(Comparison(Side(PROMPT, COMPLETION), sides))
    assert preempted >= 3
    before = scored.reference(PROMPT, COMPLETION, None)
    for figures, field in zip(found, FIELDS[:2], strict=True):
        agrees(figures, before, scored.reference(PROMPT, COMPLETION, field), COMPLETION)


def test_unsteered_side_takes_no_slot_and_has_the_salt_of_plain_requests(
    scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[Any] = []
    add = scored.engine.scheduler.add_request

    def watched(request: Any) -> None:
        added.append(request)
        add(request)

    taken: list[str] = []
    take = scored.engine.state.slots.take

    def counted() -> int:
        taken.append("slot")
        return int(take())

    monkeypatch.setattr(scored.engine.scheduler, "add_request", watched)
    monkeypatch.setattr(scored.engine.state.slots, "take", counted)
    asyncio.run(scored.scorer.log_probabilities([Side(PROMPT, COMPLETION)]))
    assert [request.cache_salt for request in added] == [None]
    assert taken == []


@pytest.mark.parametrize("leave_after", [0, 1])
def test_study_that_ends_early_leaves_nothing_in_the_worker(
    scored: Scored, leave_after: int
) -> None:
    sides = scored.sides(FIELDS, PROMPT, COMPLETION)
    comparisons = [Comparison(Side(PROMPT, COMPLETION), sides)] * 4

    async def run() -> None:
        seen = 0
        found: Callable[..., Any] = scored.scorer.compare_all
        async with aclosing(found(comparisons)) as figures:
            async for _ in figures:
                seen += 1
                if seen > leave_after:
                    assert scored.held > 0
                    break
        await asyncio.sleep(0)

    asyncio.run(run())
