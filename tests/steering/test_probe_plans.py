"""Plans of what a study wants to know."""

from __future__ import annotations

from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    SteeringPlan,
)
from steering.request.planning import make_plan
from steering.request.positions import Positions
from steering.request.probe import (
    COMPLETION_TOKENS,
    EVERY_TOKEN,
    PROMPT_TOKENS,
    KeepStream,
    Pool,
    Probe,
)
from steering.request.probe_plan import PlannedPool, PlannedStream, Window
from steering.request.spec import SteeringSpec
from tests.steering.study_texts import (
    ALL,
    EVERYWHERE,
    LENGTH,
    PROMPT,
)

NO_EDITS = SteeringSpec((), Positions(), True, False, None)


def planned(*probes: Probe, prompt_len: int = PROMPT, length: int = LENGTH) -> SteeringPlan:
    made = make_plan(NO_EDITS, {"a": 0, "b": 1}, "k", 1, prompt_len, probes=probes, length=length)
    assert SteeringPlan.from_wire(made.to_wire()) == made
    return made


def test_no_probe_looks_behind_the_text() -> None:
    made = planned(Pool("b", EVERY_TOKEN, "max"), KeepStream("a", PROMPT_TOKENS, "key"))
    pooled, kept = made.probes
    assert pooled == PlannedPool(1, (ALL,), "max", scaled=False, peaks=False)
    assert kept == PlannedStream(0, (Window(COVERS_PROMPT, 0, LENGTH),), "key")
    assert made.encoded(lambda sae: True) == {1}
    assert made.kept_streams == {0}
    assert made.encoded_until(lambda sae: True) == LENGTH
    assert made.wants_results


def test_positions_from_the_prompts_end_are_those_of_this_prompt() -> None:
    tokens = (Positions(start=-2), Positions(start=3), *COMPLETION_TOKENS)
    [kept] = planned(KeepStream("a", tokens, "key")).probes
    assert kept.windows == (
        Window(EVERYWHERE, 3, LENGTH),
        Window(COVERS_GENERATION, 0, LENGTH),
    )
