"""What is remembered of a request, and for how long."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from steering.report import features_read
from steering.request.plan import PlannedEdit, PlannedRead, SteeringPlan
from steering.worker import record as records
from steering.worker.record import Aggregate, RecordStore, RequestRecord

EDIT = PlannedEdit(0, 3, 0, 1.0, 3, 0, 100)


def plan(key: str = "k", read: PlannedRead | None = None) -> SteeringPlan:
    return SteeringPlan(key, 1, 4, (EDIT, EDIT), True, True, read)


def put(
    record: RequestRecord, positions: list[int], f: list[list[float]], skipped: int = -1
) -> None:
    values = np.array(f, dtype=np.float32)
    skips = np.zeros(values.shape, dtype=np.bool_)
    if skipped >= 0:
        skips[skipped] = True
    record.put_edits([0, 1], np.array(positions), values, ~skips, skips)


def test_counts_and_means_are_over_covered_positions() -> None:
    record = RequestRecord(plan(), 0)
    put(record, [0, 1, 2, 3], [[0, 1], [2, 1], [4, 1], [9, 9]], skipped=3)
    first, second = record.summary(4)["edits"]
    assert first == {
        "tokens_edited": 3,
        "tokens_skipped": 1,
        "tokens_active": 2,
        "mean_activation": 2.0,
        "max_activation": 4.0,
    }
    assert second["mean_activation"] == 1.0


def test_a_recomputed_position_counts_once() -> None:
    record = RequestRecord(plan(), 0)
    put(record, [0, 1, 2], [[1, 1], [1, 1], [1, 1]])
    put(record, [1, 2, 3], [[5, 5], [1, 1], [1, 1]])
    [first, _] = record.summary(4)["edits"]
    assert first["tokens_edited"] == 4
    assert first["max_activation"] == 5.0


def test_positions_past_the_limit_are_cut_off() -> None:
    record = RequestRecord(plan(), 0)
    put(record, [0, 1, 2], [[1, 1], [1, 1], [9, 9]])
    [first, _] = record.summary(2)["edits"]
    assert (first["tokens_edited"], first["max_activation"]) == (2, 1.0)


def test_an_edit_of_another_pipeline_stage_is_unknown_here() -> None:
    record = RequestRecord(plan(), 0)
    values = np.ones((1, 1), dtype=np.float32)
    yes = np.ones((1, 1), dtype=np.bool_)
    record.put_edits([1], np.array([0]), values, yes, ~yes)
    first, second = record.summary(1)["edits"]
    assert first is None
    assert second["tokens_edited"] == 1


def test_a_record_survives_preemption_and_is_fetched_once() -> None:
    store = RecordStore()
    put(store.open("r", plan(), 0), [0], [[1, 1]])
    store.pause("r")
    put(store.open("r", plan(), 0), [1], [[3, 3]])
    store.close("r")
    record = store.take("k", 0)
    assert record is not None
    assert record.summary(2)["edits"][0]["tokens_edited"] == 2
    assert store.take("k", 0) is None
    assert len(store) == 0


def test_records_that_nobody_fetches_are_forgotten_oldest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "MAX_FINISHED_RECORDS", 3)
    store = RecordStore()
    for i in range(5):
        store.open(f"r{i}", plan(f"k{i}"), 0)
        store.close(f"r{i}")
    assert [store.take(f"k{i}", 0) is None for i in range(5)] == [True, True, False, False, False]


def test_records_that_somebody_awaits_or_resumes_outlive_any_number_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "MAX_FINISHED_RECORDS", 3)
    store = RecordStore()
    awaited = replace(plan("t/a"), awaited=True)
    put(store.open("a", awaited, 0), [0], [[1, 1]])
    store.close("a")
    put(store.open("b", plan("b"), 0), [0], [[1, 1]])
    store.pause("b")
    for i in range(9):
        store.open(f"r{i}", plan(f"k{i}"), 0)
        store.close(f"r{i}")
    assert store.take("t/a", 0) is not None
    put(store.open("b", plan("b"), 0), [1], [[1, 1]])
    store.close("b")
    resumed = store.take("b", 0)
    assert resumed is not None
    assert resumed.summary(2)["edits"][0]["tokens_edited"] == 2
    assert len(store) == 2


def test_a_request_that_ends_while_it_is_preempted_is_fetched_or_forgotten() -> None:
    store = RecordStore()
    for key in ("a", "b"):
        put(store.open(key, plan(key), 0), [0], [[1, 1]])
        store.pause(key)
    store.close("a")
    assert store.take("a", 0) is not None
    assert store.take("b", 0) is not None
    assert len(store) == 0
    store.close("b")
    assert len(store) == 0


def test_a_closed_record_keeps_no_room_for_positions_that_never_came() -> None:
    store = RecordStore()
    record = store.open("r", plan(), 0)
    put(record, [0, 1, 2], [[1, 2], [3, 4], [5, 6]])
    before, roomy = record.summary(3), record.nbytes
    store.close("r")
    assert record.nbytes < roomy / 1.5
    assert record.summary(3) == before


def test_the_bytes_of_unfetched_records_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_FINISHED_BYTES", 10_000)
    store = RecordStore()
    for i in range(50):
        put(store.open(f"r{i}", plan(f"k{i}"), 0), [200], [[1, 1]])
        store.close(f"r{i}")
    assert len(store) < 5
    assert store.take("k49", 0) is not None


def test_aggregates_rank_best_first_and_break_ties_by_lower_index() -> None:
    totals = Aggregate(4)
    totals.add(np.array([[1, 0, 4, 1], [1, 0, 0, 3]], dtype=np.float32))
    assert totals.strongest("max", 2) == [[2, 4.0], [3, 3.0]]
    assert totals.strongest("mean", 4) == [[2, 2.0], [3, 2.0], [0, 1.0]]
    assert totals.strongest("frequency", 2) == [[0, 1.0], [3, 1.0]]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_aggregates_leave_out_activations_that_are_not_finite(bad: float) -> None:
    totals = Aggregate(3)
    totals.add(np.array([[bad, 1, 0], [2, 3, bad]], dtype=np.float32))
    totals.add(np.array([[2, 0, 0], [bad, 0, 0]], dtype=np.float32))
    assert totals.strongest("max", 3) == [[1, 3.0], [0, 2.0]]
    assert totals.strongest("mean", 3) == [[0, 1.0], [1, 1.0]]
    assert totals.strongest("frequency", 3) == [[0, 0.5], [1, 0.5]]


def test_a_read_of_a_rejected_token_is_forgotten_when_its_place_is_computed_anew() -> None:
    record = RequestRecord(plan(read=PlannedRead(0, 1, 3, 0, 100, None)), 0)
    record.put_read(
        np.array([0, 1]), np.array([[5], [6]]), np.array([[1.0], [2.0]], dtype=np.float32)
    )
    record.forget_reads(np.array([1, 2, 999]))
    assert list(features_read(record.summary(9)["read"])) == [(0, [[5, 1.0]])]
    assert not list(features_read(record.summary(0)["read"]))


def test_tokens_of_the_prompt_that_no_pass_computed_came_from_the_cache() -> None:
    record = RequestRecord(plan(), 0)
    assert record.summary(9)["cached"] is None
    put(record, [3, 4], [[1, 1], [1, 1]])
    assert record.summary(9)["cached"] == 3
    # Preempted, and computed from further in front: those positions were edited by this request.
    put(record, [2, 3], [[1, 1], [1, 1]])
    assert record.summary(9)["cached"] == 2


def test_what_is_not_finite_is_left_out_of_what_json_must_hold() -> None:
    record = RequestRecord(plan(read=PlannedRead(0, 2, 3, 0, 100, None)), 0)
    put(record, [0, 1], [[np.inf, 1], [2, 1]])
    values = np.array([[np.inf, 1.0]], dtype=np.float32)
    record.put_read(np.array([0]), np.array([[5, 6]]), values)
    summary = record.summary(9)
    first, second = summary["edits"]
    assert (first["tokens_edited"], first["mean_activation"], first["max_activation"]) == (
        2,
        None,
        None,
    )
    assert second["max_activation"] == 1.0
    assert list(features_read(summary["read"])) == [(0, [[6, 1.0]])]
