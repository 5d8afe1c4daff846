"""What is told of a streamed answer, on events of vLLM's as they pass by."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.streaming import Splice, message_events, response_events
from steering.report import Report, Ticket

READS = [{"sae": "b", "tokens": [{"position": position}]} for position in range(3)]


def named(name: str, **fields: Any) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n"


async def spliced(splice: Splice, events: dict[str, int | None]) -> list[dict[str, Any]]:
    """What becomes of events, before each of which so many of the reads arrive."""
    ticket = Ticket(True)
    place = ticket.expect()
    ticket.put(place, [Report([], 0)])

    async def passing() -> AsyncIterator[str]:
        for event, read in events.items():
            if read is not None:
                ticket.put_streamed(place, 0, READS[read])
            yield event

    return [json.loads(event.partition("\ndata: ")[2]) async for event in splice(passing(), ticket)]


@pytest.mark.parametrize(
    ("splice", "last"),
    [
        (response_events, named("response.completed", response={"id": "r"})),
        (message_events, named("message_stop")),
    ],
)
async def test_read_is_on_the_next_event_and_the_report_is_the_last_ones(
    splice: Splice, last: str
) -> None:
    made = await spliced(
        splice,
        {named("begin"): None, named("delta", text="a"): 0, named("more"): 1, last: None},
    )
    report = {"interventions": [], "tokens_cached": 0}
    assert made[:3] == [
        {"type": "begin"},
        {"type": "delta", "text": "a", "steering": {"read": READS[0]}},
        {"type": "more", "steering": {"read": READS[1]}},
    ]
    assert made[3].get("response", made[3])["steering"] == report


@pytest.mark.parametrize("splice", [response_events, message_events])
async def test_error_stays_as_it_is(splice: Splice) -> None:
    made = await spliced(splice, {named("error", error={"message": "gone"}): 0})
    assert made == [{"type": "error", "error": {"message": "gone"}}]


async def test_what_no_event_before_could_carry_is_on_the_completed_one() -> None:
    last = named("response.completed", response={"id": "r"})
    [made] = await spliced(response_events, {last: 0})
    assert made["steering"] == {"read": READS[0]}
    assert "read" not in made["response"]["steering"]
