"""From what workers recorded to the response's `steering`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from sae.self_check import Measured
from steering.report import (
    Choice,
    Report,
    Summary,
    Ticket,
    features_read,
    response_object,
)
from steering.request.parse import parse_spec
from steering.request.plan import PlannedEdit, PlannedRead, SteeringPlan
from steering.request.planning import make_plan
from steering.request.spec import SteeringSpec
from steering.worker.record import RequestRecord


class Facts:
    """An SAE of 100 features at one hook point."""

    d_sae = 100

    def __init__(self, hook: str) -> None:
        self.hook = self.reads = hook
        self.writes: tuple[str, ...] = (hook,)
        self.error_term = self.affine = True

    def max_activation(self, feature: int) -> float | None:
        return None


SAES = {"a": Facts("blocks.1.hook_resid_post"), "b": Facts("blocks.2.hook_resid_post")}
FIELD = {
    "interventions": [
        {"sae": "a", "feature": 3, "op": "clamp", "value": 2},
        {"sae": "b", "feature": 7, "op": "ablate"},
    ],
    "read": {"sae": "b", "top_k": 2},
    "report": True,
}
SPEC = parse_spec(FIELD, SAES)
CHOICE = Choice(prompt=[10, 11, 12], generated=[13, 14], prompt_len=3, cached=1)


def figures(edited: int, **more: Any) -> dict[str, Any]:
    return {
        "tokens_edited": edited,
        "tokens_skipped": 0,
        "tokens_active": 1,
        "mean_activation": 0.5,
        "max_activation": 1.0,
        **more,
    }


def report(
    *summaries: Summary, choice: Choice = CHOICE, spec: SteeringSpec = SPEC, **more: Any
) -> Report:
    read = next((s.read for s in summaries if s.read is not None), None)
    features = () if read is None else features_read(read)
    return Report.of(spec, choice, summaries, features, lambda ids: f"<{ids[0]}>", **more)


def test_each_pipeline_stage_tells_of_the_edits_at_its_layers() -> None:
    made = report(
        Summary(0, edits=[figures(4), None], edited=[{"hook": "one", "tokens": 4}]),
        Summary(0, edits=[None, figures(2)], edited=[{"hook": "two", "tokens": 2}]),
    )
    assert [entry["tokens_edited"] for entry in made.interventions] == [4, 2]
    assert made.interventions[1] == {
        "sae": "b",
        "feature": 7,
        "op": "ablate",
        "value": 0.0,
        "effective_value": 0.0,
        **figures(2),
    }
    assert made.to_json(True)["edited"] == [
        {"hook": "one", "tokens": 4},
        {"hook": "two", "tokens": 2},
    ]


def test_edit_that_no_token_came_to_has_counts_of_zero() -> None:
    entry = report(Summary(0, edits=[None, None])).interventions[0]
    assert (entry["tokens_edited"], entry["mean_activation"]) == (0, None)
    assert "tokens_held_back" not in entry


def test_edit_with_a_condition_that_no_token_came_to_held_none_back() -> None:
    spec = parse_spec({**FIELD, "when": {"sae": "a", "feature": 1, "above": 0}}, SAES)
    for summary in (Summary(0, edits=[None, None]), Summary(0)):
        entries = report(summary, spec=spec).interventions
        assert [entry["tokens_held_back"] for entry in entries] == [0, 0]


def test_figures_are_passed_on_as_the_worker_named_them() -> None:
    held = figures(4, tokens_held_back=3)
    entries = report(Summary(0, edits=[held, figures(1)])).interventions
    assert entries[0]["tokens_held_back"] == 3
    assert "tokens_held_back" not in entries[1]


def test_what_was_not_recorded_is_left_out() -> None:
    body = report(Summary(0, edits=[figures(1), figures(1)])).to_json(True)
    assert body.keys() == {"interventions", "tokens_cached", "read"}
    full = report(Summary(0, edited=[]), protected={"norm_kept": 0.9}).to_json(True)
    assert full["edited"] == []
    assert full["protected"] == {"norm_kept": 0.9}


def test_where_a_choice_stopped_is_told_without_a_report() -> None:
    spec = parse_spec({"stop_when": {"sae": "b", "feature": 7, "above": 2}}, SAES)
    found = Summary(0, stopped={"gate": 0, "position": 4, "activation": 2.5})
    # A token that only asynchronous scheduling fed to the model ends nothing.
    for stopped in (True, False):
        choice = replace(CHOICE, stopped=stopped)
        body = Report.of(spec, choice, [found], (), str).to_json(False)
        told = {"sae": "b", "feature": 7, "position": 4, "activation": 2.5}
        assert body == ({"stopped": told} if stopped else {})


def test_token_that_ended_its_choice_entered_the_model() -> None:
    assert CHOICE.entered == 4
    assert replace(CHOICE, stopped=True).entered == 5


def test_streamed_reads_are_told_once_and_named_by_choice_where_there_are_several() -> None:
    alone = Ticket(False)
    place = alone.expect()
    assert alone.take_streamed() is None
    for position in (3, 4):
        alone.put_streamed(place, 0, {"sae": "b", "tokens": [{"position": position}]})
    assert alone.take_streamed() == {
        "read": {"sae": "b", "tokens": [{"position": 3}, {"position": 4}]}
    }
    assert alone.take_streamed() is None
    several = Ticket(False)
    places = several.expect(2), several.expect(2)
    several.put_streamed(places[1], 1, {"sae": "b", "tokens": [{"position": 0}]})
    assert several.take_streamed() == {
        "choices": [{"index": 3, "read": {"sae": "b", "tokens": [{"position": 0}]}}]
    }


def test_read_of_a_later_turn_is_streamed_as_the_only_choices_own() -> None:
    ticket = Ticket(False, turns=True)
    for position in (3, 4):
        ticket.put_streamed(ticket.expect(), 0, {"sae": "b", "tokens": [{"position": position}]})
        assert ticket.take_streamed() == {"read": {"sae": "b", "tokens": [{"position": position}]}}


def test_cached_tokens_are_the_workers_count_if_there_is_one() -> None:
    assert report(Summary(0)).tokens_cached == 1
    assert report(Summary(0, cached=0)).tokens_cached == 0


@pytest.mark.parametrize(("prompt_len", "phase"), [(3, "prompt"), (2, "generation")])
def test_phase_of_a_token_that_was_read_is_by_where_generation_begins(
    prompt_len: int, phase: str
) -> None:
    read = [
        np.array([2], np.int64).tobytes(),
        np.array([[8, 5]], np.int32).tobytes(),
        np.array([[1.5, 0.0]], np.float32).tobytes(),
    ]
    choice = Choice([10, 11, 12], [13], prompt_len)
    made = report(Summary(0, read=read), choice=choice)
    assert made.read == {
        "sae": "b",
        "tokens": [
            {"position": 2, "id": 12, "text": "<12>", "phase": phase, "features": [[8, 1.5]]}
        ],
    }


def test_last_sampled_token_never_entered_the_model() -> None:
    assert CHOICE.entered == 4
    assert Choice([10, 11], [], 2).entered == 2


def test_summary_comes_off_the_wire_as_it_went_on() -> None:
    sent = Summary(1, 2, [figures(1), None], [{"hook": "h"}], None, [b"", b"", b""], [[1, 2.0]])
    assert Summary.from_wire(sent.to_wire()) == sent


def test_what_a_worker_recorded_becomes_the_reports_entry() -> None:
    """A plan, a record of two passes and a report, by hand."""
    plan = make_plan(SPEC, {"a": 0, "b": 1}, key="k", children=1, prompt_len=3)
    record = RequestRecord(plan, 0, [0], [("blocks.1.hook_resid_post", 0)])
    f = np.array([[0.0], [2.0], [4.0], [9.0]], np.float32)
    record.put_edits(np.arange(1, 5), f, np.full((4, 1), 0.5, np.float32))
    choice = Choice([10, 11, 12], [13, 14], 3)  # position 4 is the last sampled token
    made = Report.of(SPEC, choice, [Summary.from_wire(record.summary(choice.entered))], (), str)
    entry = made.interventions[0]
    assert (entry["tokens_edited"], entry["tokens_active"]) == (3, 2)
    assert (entry["mean_activation"], entry["max_activation"]) == (2.0, 4.0)
    assert made.tokens_cached == 1  # position 0 came from the cache
    hook = {"hook": "blocks.1.hook_resid_post", "tokens": 3, "tokens_limited": 0}
    assert made.edited == [{**hook, "mean_share": 0.5, "max_share": 0.5}]


def test_measurements_of_a_self_check_are_no_part_of_a_response() -> None:
    measured = Measured(tokens=3, sinks=0, l0=8.0, variance_explained=0.9)
    made = report(Summary(0, measured=asdict(measured), aggregate=[[1, 2.0]]))
    assert made.measured == measured
    assert made.to_json(True).keys() == {"interventions", "tokens_cached", "read"}


def test_several_choices_are_listed_by_index() -> None:
    one = Report([], 0, {"sae": "a", "tokens": []})
    assert response_object([one], False) == {"read": {"sae": "a", "tokens": []}}
    assert [c["index"] for c in response_object([one, one], False)["choices"]] == [0, 1]


def test_ticket_keeps_the_order_of_prompts_whichever_ends_first() -> None:
    ticket = Ticket(True)
    first, second = ticket.expect(), ticket.expect()
    ticket.put(second, [Report([], 2)])
    ticket.put(first, [Report([], 1)])
    assert [made.tokens_cached for made in ticket.reports] == [1, 2]


def test_last_turn_stands_for_the_conversation() -> None:
    ticket = Ticket(True, turns=True)
    for turn in range(3):
        ticket.put(ticket.expect(), [Report([], turn)])
    assert ticket.to_json() == {"interventions": [], "tokens_cached": 2}


def test_plan_survives_the_wire_with_its_own_prompt_length() -> None:
    edit = PlannedEdit(0, 3, 0, 1.0, 3, 0, 100)
    plan = SteeringPlan("k", 2, 4, (edit,), True, True, PlannedRead(0, 5, 3, 0, 9, None), True)
    assert SteeringPlan.from_wire(plan.to_wire()) == plan
