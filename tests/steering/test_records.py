"""What is remembered of a request, and for how long."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from steering.report import features_read
from steering.request.plan import PlannedEdit, PlannedRead, SteeringPlan
from steering.worker import record_store
from steering.worker.ops.layout import HELD_BACK, NOT_COVERED, NOT_EDITED, SKIPPED_SINK
from steering.worker.record import RequestRecord
from steering.worker.record_store import RecordStore

EDIT = PlannedEdit(0, 3, 0, 1.0, 3, 0, 100)
HOOKS = (("blocks.1.hook_resid_post", 0), ("blocks.2.hook_resid_post", 1))


def plan(key: str = "k", read: PlannedRead | None = None) -> SteeringPlan:
    return SteeringPlan(key, 1, 4, (EDIT, EDIT), True, True, read)


def new(its_plan: SteeringPlan | None = None, columns: tuple[int, ...] = (0, 1)) -> RequestRecord:
    return RequestRecord(its_plan or plan(), 0, columns, HOOKS)


def put(
    record: RequestRecord,
    positions: list[int],
    f: list[list[float]],
    share: list[list[float]] | None = None,
) -> None:
    nothing = [[NOT_EDITED, NOT_EDITED]] * len(positions)
    record.put_edits(
        np.array(positions),
        np.array(f, dtype=np.float32),
        np.array(nothing if share is None else share, dtype=np.float32),
    )


def test_counts_and_means_are_over_covered_positions() -> None:
    record = new()
    sink = [SKIPPED_SINK, SKIPPED_SINK]
    put(record, [0, 1, 2, 3, 4], [[0, 1], [2, 1], [4, 1], sink, [NOT_COVERED, 1]])
    first, second = record.summary(5)["edits"]
    assert first == {
        "tokens_edited": 3,
        "tokens_skipped": 1,
        "tokens_active": 2,
        "mean_activation": 2.0,
        "max_activation": 4.0,
    }
    assert second["mean_activation"] == 1.0


def test_a_recomputed_position_counts_once() -> None:
    record = new()
    put(record, [0, 1, 2], [[1, 1], [1, 1], [1, 1]])
    put(record, [1, 2, 3], [[5, 5], [1, 1], [1, 1]])
    [first, _] = record.summary(4)["edits"]
    assert first["tokens_edited"] == 4
    assert first["max_activation"] == 5.0


def test_positions_past_the_limit_are_cut_off() -> None:
    record = new()
    put(record, [0, 1, 2], [[1, 1], [1, 1], [9, 9]])
    [first, _] = record.summary(2)["edits"]
    assert (first["tokens_edited"], first["max_activation"]) == (2, 1.0)


def test_an_edit_of_another_pipeline_stage_is_unknown_here() -> None:
    record = new(columns=(1,))
    put(record, [0], [[7, 1]])
    first, second = record.summary(1)["edits"]
    assert first is None
    assert second["tokens_edited"] == 1
    assert second["max_activation"] == 1.0


def test_tokens_that_a_condition_held_back_are_counted_apart() -> None:
    gated = replace(plan(), edits=(replace(EDIT, gates=1), EDIT))
    record = new(gated)
    put(record, [0, 1, 2], [[HELD_BACK, 1], [3, 1], [HELD_BACK, 1]])
    first, second = record.summary(3)["edits"]
    assert (first["tokens_edited"], first["tokens_held_back"]) == (1, 2)
    assert (first["tokens_active"], first["mean_activation"]) == (1, 3.0)
    assert "tokens_held_back" not in second


def test_each_hook_point_that_was_edited_is_summed_up() -> None:
    record = new()
    put(
        record,
        [0, 1, 2],
        [[1, 1]] * 3,
        [[0.25, NOT_EDITED], [-0.75, NOT_EDITED], [NOT_EDITED, NOT_EDITED]],
    )
    assert record.summary(3)["edited"] == [
        {
            "hook": "blocks.1.hook_resid_post",
            "tokens": 2,
            "mean_share": 0.5,
            "max_share": 0.75,
            "tokens_limited": 1,
        }
    ]
    assert record.summary(1)["edited"][0]["tokens_limited"] == 0


def test_a_record_survives_preemption_and_is_fetched_once() -> None:
    store = RecordStore()
    put(store.open("r", new), [0], [[1, 1]])
    store.pause("r")
    put(store.open("r", new), [1], [[3, 3]])
    store.close("r")
    record = store.take("k", 0)
    assert record is not None
    assert record.summary(2)["edits"][0]["tokens_edited"] == 2
    assert store.take("k", 0) is None
    assert len(store) == 0


def test_records_that_nobody_fetches_are_forgotten_oldest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record_store, "MAX_FINISHED_RECORDS", 3)
    store = RecordStore()
    for i in range(5):
        store.open(f"r{i}", partial(new, plan(f"k{i}")))
        store.close(f"r{i}")
    assert [store.take(f"k{i}", 0) is None for i in range(5)] == [True, True, False, False, False]


def test_records_that_somebody_awaits_or_resumes_outlive_any_number_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record_store, "MAX_FINISHED_RECORDS", 3)
    store = RecordStore()
    awaited = replace(plan("t/a"), awaited=True)
    put(store.open("a", partial(new, awaited)), [0], [[1, 1]])
    store.close("a")
    put(store.open("b", partial(new, plan("b"))), [0], [[1, 1]])
    store.pause("b")
    for i in range(9):
        store.open(f"r{i}", partial(new, plan(f"k{i}")))
        store.close(f"r{i}")
    assert store.take("t/a", 0) is not None
    put(store.open("b", partial(new, plan("b"))), [1], [[1, 1]])
    store.close("b")
    resumed = store.take("b", 0)
    assert resumed is not None
    assert resumed.summary(2)["edits"][0]["tokens_edited"] == 2
    assert len(store) == 2


def test_a_request_that_ends_while_it_is_preempted_is_fetched_or_forgotten() -> None:
    store = RecordStore()
    for key in ("a", "b"):
        put(store.open(key, partial(new, plan(key))), [0], [[1, 1]])
        store.pause(key)
    store.close("a")
    assert store.take("a", 0) is not None
    assert store.take("b", 0) is not None
    assert len(store) == 0
    store.close("b")
    assert len(store) == 0


def test_the_bytes_of_unfetched_records_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_store, "MAX_FINISHED_BYTES", 10_000)
    store = RecordStore()
    for i in range(50):
        many = list(range(100))
        put(store.open(f"r{i}", partial(new, plan(f"k{i}"))), many, [[1, 1]] * len(many))
        store.close(f"r{i}")
    assert len(store) < 5
    assert store.take("k49", 0) is not None


def test_tokens_of_the_prompt_that_no_pass_computed_came_from_the_cache() -> None:
    record = new()
    assert record.summary(9)["cached"] is None
    put(record, [3, 4], [[1, 1], [1, 1]])
    assert record.summary(9)["cached"] == 3
    # Preempted, and computed from further in front: those positions were edited by this request.
    put(record, [2, 3], [[1, 1], [1, 1]])
    assert record.summary(9)["cached"] == 2


def test_what_is_not_finite_is_left_out_of_what_json_must_hold() -> None:
    record = new(plan(read=PlannedRead(0, 2, 3, 0, 100, None)))
    put(record, [0, 1], [[np.inf, 1], [2, 1]])
    values = np.array([[np.inf, 1.0]], dtype=np.float32)
    record.put_reads(np.array([0]), np.array([True]), np.array([[5, 6]]), values)
    summary = record.summary(9)
    first, second = summary["edits"]
    assert (first["tokens_edited"], first["mean_activation"], first["max_activation"]) == (
        2,
        None,
        None,
    )
    assert second["max_activation"] == 1.0
    assert list(features_read(summary["read"])) == [(0, [[6, 1.0]])]
