"""Conditions: each scope by hand on every version, and any cutting of a sequence into passes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.sae import SAE
from steering.request.limits import MAX_GATES
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SPECIAL,
    GATE_ABOVE,
    GATE_BELOW,
    OP_ADD,
    SCOPE_PROMPT,
    SCOPE_SO_FAR,
    SCOPE_STOP,
    SCOPE_TOKEN,
    PlannedEdit,
    PlannedGate,
    SteeringPlan,
)
from steering.worker.ops import cpu_kernel
from steering.worker.ops.buffers import Kernel
from steering.worker.ops.layout import (
    FIRST_GATE_COLUMN,
    HELD_BACK,
    NEVER,
    P_SINK,
    SKIPPED_SINK,
)
from tests.models import D_MODEL, make_tiny_sae
from tests.steering.batches import Gates, edit, one_request, plain_params, pool
from tests.steering.tiny_worker import ORDINARY, SPECIAL, TinyWorker, tied_sae
from tests.steering.versions import Version, assert_agrees, fast_versions, versions

EVERYWHERE = COVERS_PROMPT | COVERS_GENERATION
READ_FIRST, WRITE_SECOND = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def gate(sense: int, scope: int, threshold: float = 1.0, row: int = 0) -> PlannedGate:
    return PlannedGate(0, row, sense, threshold, scope)


def held(
    version: Version,
    first: list[float],
    gates: list[PlannedGate],
    *,
    coverage: int = EVERYWHERE,
    start: int = 5,
    prompt_len: int = 8,
    ids: list[int] | None = None,
    named: int | None = None,
    any_gate: bool = False,
    first_held: list[int] | None = None,
) -> list[bool]:
    """Which tokens an edit of +1 reaches, whose conditions read the stream's first coordinate."""
    rows = pool(READ_FIRST, WRITE_SECOND, plain_params(1))
    named = 2 ** len(gates) - 1 if named is None else named
    batch = one_request(
        torch.tensor([[f, 0.5] for f in first]),
        [edit(0, OP_ADD, 1.0, coverage, gates=named, any_gate=any_gate)],
        rows,
        first=start,
        prompt_len=prompt_len,
        input_ids=ids,
        gates=Gates(gates, first_held or ()),
    )
    made = version(batch)
    reached: list[bool] = (made.hidden[:, 1] == 1.5).tolist()
    assert torch.equal(
        made.hidden[~torch.tensor(reached)], batch.hidden_states[~torch.tensor(reached)]
    )
    return reached


@versions
@pytest.mark.parametrize(
    ("sense", "scope", "open_at"),
    [
        (GATE_ABOVE, SCOPE_TOKEN, [False, False, True, False, False]),
        (GATE_BELOW, SCOPE_TOKEN, [True, True, False, True, True]),
        (GATE_ABOVE, SCOPE_SO_FAR, [False, False, True, True, True]),
        (GATE_BELOW, SCOPE_SO_FAR, [True, True, False, False, False]),
    ],
)
def test_each_scope_is_open_where_it_says(
    version: Version, sense: int, scope: int, open_at: list[bool]
) -> None:
    # The second token lies on the threshold: not above it.
    assert held(version, [0.5, 1.0, 1.5, -3.0, 0.0], [gate(sense, scope)]) == open_at


@versions
@pytest.mark.parametrize(("sense", "opens"), [(GATE_ABOVE, True), (GATE_BELOW, False)])
def test_a_prompts_condition_decides_about_every_token_after_it(
    version: Version, sense: int, opens: bool
) -> None:
    # The prompt ends before position 8; the third token is its last.
    gates = [gate(sense, SCOPE_PROMPT)]
    generation = partial(held, version, gates=gates, coverage=COVERS_GENERATION)
    assert generation([0.0, 0.0, 5.0, 0.0, 0.0]) == [False] * 3 + [opens] * 2
    after = generation([0.0, 0.0, 0.0, 5.0, 0.0])
    assert after == [False] * 3 + [not opens] * 2


@versions
def test_a_prompts_condition_is_remembered_in_later_passes(version: Version) -> None:
    gates = [gate(GATE_ABOVE, SCOPE_PROMPT)]
    decode = partial(held, version, gates=gates, start=20, coverage=COVERS_GENERATION)
    assert decode([0.0], first_held=[3]) == [True]
    assert decode([9.0], first_held=[NEVER]) == [False]


@versions
@pytest.mark.parametrize("sense", [GATE_ABOVE, GATE_BELOW])
def test_special_tokens_and_the_first_never_fulfil_a_condition(
    version: Version, sense: int
) -> None:
    f = 5.0 if sense == GATE_ABOVE else 0.0
    reached = held(
        version,
        [f] * 3,
        [gate(sense, SCOPE_TOKEN)],
        coverage=EVERYWHERE | COVERS_SPECIAL,
        start=0,
        ids=[10, 1, 10],
    )
    assert reached == [False, False, True]


@versions
def test_a_special_token_is_passed_over_by_what_looks_at_all_tokens(version: Version) -> None:
    ids = [10, 1, 10]
    assert held(version, [0.0, 9.0, 0.0], [gate(GATE_BELOW, SCOPE_SO_FAR)], ids=ids) == [
        True,
        False,  # special: not covered
        True,
    ]


@versions
def test_all_conditions_must_hold_or_any_one(version: Version) -> None:
    gates = [gate(GATE_ABOVE, SCOPE_TOKEN, 1.0), gate(GATE_BELOW, SCOPE_TOKEN, 3.0)]
    assert held(version, [0.0, 2.0, 4.0], gates) == [False, True, False]
    assert held(version, [0.0, 2.0, 4.0], gates, any_gate=True) == [True, True, True]
    assert held(version, [0.0, 2.0, 4.0], gates, named=0b10) == [True, True, False]
    assert held(version, [0.0, 2.0, 4.0], gates, named=0) == [True, True, True]


@versions
def test_a_condition_reads_the_stream_as_it_was_before_the_edits_there(version: Version) -> None:
    rows = pool(READ_FIRST, READ_FIRST, plain_params(1))
    batch = one_request(
        torch.tensor([[0.0, 0.0]]),
        [edit(0, OP_ADD, 5.0, EVERYWHERE), edit(0, OP_ADD, 7.0, EVERYWHERE, gates=1)],
        rows,
        gates=Gates([gate(GATE_ABOVE, SCOPE_TOKEN)]),
    )
    assert version(batch).hidden[0, 0] == 5.0


@versions
def test_a_sink_has_no_event_and_is_reported_as_one(version: Version) -> None:
    params = plain_params(1)
    params[0, P_SINK] = 10.0
    batch = one_request(
        torch.tensor([[50.0, 0.5], [3.0, 0.5], [0.0, 0.5]]),
        [edit(0, OP_ADD, 1.0, EVERYWHERE, gates=1)],
        pool(READ_FIRST, WRITE_SECOND, params),
        gates=Gates([gate(GATE_ABOVE, SCOPE_TOKEN)]),
    )
    made = version(batch)
    assert made.hidden[:, 1].tolist() == [0.5, 1.5, 0.5]
    assert made.buffers.f[:, 0].tolist() == [SKIPPED_SINK, 3.0, HELD_BACK]
    assert made.buffers.f[1, FIRST_GATE_COLUMN] == 3.0
    # Kept off by its condition, not by being a sink.
    assert made.buffers.counters.tolist() == [1, 0]


@versions
def test_a_stop_is_found_behind_the_prompt_alone(version: Version) -> None:
    rows = pool(READ_FIRST, WRITE_SECOND, plain_params(1))
    batch = one_request(
        torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 0.0], [9.0, 0.0]]),
        [],
        rows,
        first=6,
        prompt_len=8,
        gates=Gates([gate(GATE_ABOVE, SCOPE_STOP)]),
    )
    made = version(batch)
    assert made.buffers.gate_state.first_held[0, 0] == 9
    assert torch.equal(made.hidden, batch.hidden_states)


@fast_versions
def test_eight_conditions_on_every_edit_agree(version: Version) -> None:
    from tests.steering.batches import random_batch

    for seed in range(6):
        made = assert_agrees(
            version,
            random_batch(seed, d_in=96, tokens=(4, 3, 5), steered=1, max_edits=9, max_gates=8),
        )
        assert made.buffers.gate_state.events.any()


# --- any cutting into passes ----------------------------------------------------------------------

LENGTH, PROMPT = 14, 8
KERNELS: dict[str, Kernel | None] = {"torch": None, "cpu": cpu_kernel}


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> list[SAE]:
    """At layers 1 and 2; the second one's activations need a whole encode."""
    folder = tmp_path_factory.mktemp("saes")
    from sae.sae import open_sae
    from sae.source import ResolvedSAE

    path = make_tiny_sae(folder / "topk", architecture="topk", layer=2, seed=5, k=32)
    return [
        tied_sae(folder / "jumprelu", layer=1),
        open_sae(ResolvedSAE("topk", str(path), path=str(path))),
    ]


def opened(plan: SteeringPlan, f: torch.Tensor, special: list[bool]) -> list[bool]:
    """Where the plan's one edit is made: the contract's words, position by position.

    Args:
        plan: the request.
        f: ``[gates, LENGTH]``.
        special: of each token; the first counts as one.
    """
    [its_edit] = plan.edits
    reached = []
    for t in range(LENGTH):
        is_prompt = t < plan.prompt_len
        covered = bool(its_edit.coverage & (COVERS_PROMPT if is_prompt else COVERS_GENERATION))
        answers = []
        for g, planned in enumerate(plan.gates):
            above = [bool(f[g, i] > planned.threshold) and not special[i] for i in range(LENGTH)]
            if planned.scope == SCOPE_TOKEN:
                holds = above[t] if planned.sense == GATE_ABOVE else not (above[t] or special[t])
            else:
                seen = above[: t + 1 if planned.scope == SCOPE_SO_FAR else plan.prompt_len]
                holds = any(seen) == (planned.sense == GATE_ABOVE)
            if its_edit.gates >> g & 1:
                answers.append(holds)
        holds = any(answers) if its_edit.any_gate else all(answers)
        reached.append(covered and not special[t] and holds)
    return reached


@dataclass
class Cut:
    """How a sequence is computed: chunks, what is computed again, and a preemption.

    Attributes:
        steps: tokens of each pass; negative ones are tokens of the last pass that were rejected.
        preempted_at: before which of the passes the request is preempted; None for never.
    """

    steps: list[tuple[int, int]]
    preempted_at: int | None


cuts = st.builds(
    Cut,
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=LENGTH, max_size=LENGTH),
    st.none() | st.integers(1, 6),
)
gates_of_requests = st.lists(
    st.builds(
        PlannedGate,
        st.sampled_from([0, 1]),
        st.integers(0, 127),
        st.sampled_from([GATE_ABOVE, GATE_BELOW]),
        st.sampled_from([0.0, 1.0, 3.0, 4.0]),
        st.sampled_from([SCOPE_TOKEN, SCOPE_SO_FAR, SCOPE_PROMPT]),
    ),
    min_size=1,
    max_size=MAX_GATES,
)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), gates=gates_of_requests, any_gate=st.booleans(), cut=cuts)
def test_a_condition_does_not_depend_on_how_the_sequence_was_cut_into_passes(
    saes: list[SAE], kernel: str, seed: int, gates: list[PlannedGate], any_gate: bool, cut: Cut
) -> None:
    rng = torch.Generator().manual_seed(seed)
    streams = [torch.randn(LENGTH, D_MODEL, generator=rng) * 2 for _ in saes]
    ids = [SPECIAL if p < 0.15 else ORDINARY for p in torch.rand(LENGTH, generator=rng).tolist()]
    special = [i == 0 or token == SPECIAL for i, token in enumerate(ids)]
    # An edit at the first layer is made before the second is read, but for what the prompt says.
    gates = [g if g.sae == 0 else PlannedGate(1, *_after_sae(g), SCOPE_PROMPT) for g in gates]
    coverage = COVERS_GENERATION if any(g.scope == SCOPE_PROMPT for g in gates) else EVERYWHERE
    f = torch.stack([saes[g.sae].activations(streams[g.sae], [g.latent])[:, 0] for g in gates])
    near = (f - torch.tensor([g.threshold for g in gates])[:, None]).abs()
    if bool(((near < 1e-4) & (near > 0)).any()):
        return  # rounding would decide
    its_edit = PlannedEdit(0, 3, OP_ADD, 50.0, coverage, 0, LENGTH, 2 ** len(gates) - 1, any_gate)
    plan = SteeringPlan("k", 1, PROMPT, (its_edit,), True, True, None, gates=tuple(gates))
    worker = TinyWorker(saes, KERNELS[kernel])
    # Another request's leftovers in the slot.
    others = [torch.randn(LENGTH, D_MODEL, generator=rng) * 2 for _ in saes]
    worker.state.add_request("before", plan)
    worker.forward([("before", 0, LENGTH)], {"before": others})
    worker.state.remove_request("before")

    worker.state.add_request("r", plan)
    reached = _run(worker, plan, streams, others, ids, cut)
    assert reached == opened(plan, f, special)
    [summary] = worker.state.take_results("k", {0: LENGTH})
    entry = summary["edits"][0]
    assert entry["tokens_edited"] == sum(reached)
    covered = sum(not special[t] and (t >= PROMPT or coverage == EVERYWHERE) for t in range(LENGTH))
    assert entry["tokens_held_back"] == covered - sum(reached)


def _after_sae(g: PlannedGate) -> tuple[int, int, float]:
    return g.latent, g.sense, g.threshold


def _run(
    worker: TinyWorker,
    plan: SteeringPlan,
    streams: list[torch.Tensor],
    others: list[torch.Tensor],
    ids: list[int],
    cut: Cut,
) -> list[bool]:
    """Compute the sequence as the cut says; which tokens were edited when they were kept."""
    reached = [False] * LENGTH
    position = 0
    for number, (scheduled, rejected) in enumerate(cut.steps):
        if number == cut.preempted_at:
            worker.state.pause_request("r")
            # Somebody else has the slot meanwhile, and then the request has another one.
            worker.state.add_request("other", plan)
            worker.state.add_request("r", plan)
            worker.state.remove_request("other")
            scheduled, rejected, position = max(scheduled, position), 0, 0
        if position >= LENGTH:
            break
        stop = min(position + scheduled, LENGTH if position >= PROMPT else max(PROMPT, scheduled))
        stop = min(stop, LENGTH)
        # Behind the prompt a pass may be speculative; one of its tokens is kept. The others are
        # other tokens than those that come there in the end.
        kept = stop - position
        if position >= PROMPT:
            kept = max(1, kept - rejected)
        drafted = [
            torch.cat([right[: position + kept], wrong[position + kept :]])
            for right, wrong in zip(streams, others, strict=True)
        ]
        [[hidden, _]] = worker.forward([("r", position, stop)], {"r": drafted}, {"r": ids})
        changed = (hidden != drafted[0][position:stop]).any(dim=1)
        reached[position:stop] = changed.tolist()
        position += kept
    if position < LENGTH:
        [[hidden, _]] = worker.forward([("r", position, LENGTH)], {"r": streams}, {"r": ids})
        reached[position:] = (hidden != streams[0][position:]).any(dim=1).tolist()
    return reached


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scope", [SCOPE_SO_FAR, SCOPE_STOP])
def test_what_a_rejected_token_fulfilled_is_forgotten(
    saes: list[SAE], kernel: str, scope: int
) -> None:
    quiet = [torch.zeros(LENGTH, D_MODEL) for _ in saes]
    fires = quiet[0].clone()
    fires[10] = 20 * saes[0].rows([3]).W_enc[0]
    plan = SteeringPlan(
        "k",
        1,
        PROMPT,
        (PlannedEdit(0, 9, OP_ADD, 50.0, EVERYWHERE, 0, LENGTH, gates=1),),
        True,
        False,
        None,
        gates=(PlannedGate(0, 3, GATE_ABOVE, 5.0, scope),),
    )
    worker = TinyWorker(saes, KERNELS[kernel])
    worker.state.add_request("r", plan)
    worker.forward([("r", 0, PROMPT)], {"r": quiet})
    worker.forward([("r", PROMPT, 12)], {"r": [fires, quiet[1]]})
    assert worker.state._gate_state.first_held[worker.state.slot_of("r"), 0] == 10
    [[hidden, _]] = worker.forward([("r", 9, LENGTH)], {"r": quiet})
    assert worker.state._gate_state.first_held[worker.state.slot_of("r"), 0] == NEVER
    assert torch.equal(hidden, quiet[0][9:])


# --- stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_stops_judge_the_last_token_of_the_pass_and_name_its_first_gate(
    saes: list[SAE], kernel: str
) -> None:
    rng = torch.Generator().manual_seed(3)
    streams = [torch.randn(LENGTH, D_MODEL, generator=rng) * 2 for _ in saes]
    f = saes[0].activations(streams[0], list(range(128)))
    # Two features that are silent at 8 and 9 and fire at 10.
    silent = (f[8] == 0) & (f[9] == 0)
    fires = (silent & (f[10] > 0)).nonzero()[:, 0].tolist()
    assert len(fires) >= 2
    gates = tuple(PlannedGate(0, latent, GATE_ABOVE, 0.0, SCOPE_STOP) for latent in fires[:2])
    plan = SteeringPlan("k", 1, PROMPT, (), True, False, None, gates=gates)
    worker = TinyWorker(saes, KERNELS[kernel])
    worker.state.add_request("r", plan)
    worker.state.add_request("steered", SteeringPlan("s", 1, 1, (), True, False, None))
    both = {"r": streams, "steered": streams}
    worker.forward([("steered", 0, 2), ("r", 0, PROMPT)], both)
    stops = worker.state.stops()
    assert stops is not None
    assert (stops.req_ids, stops.position.tolist()) == (["r"], [NEVER])
    worker.forward([("r", 8, 10), ("steered", 2, 3)], both)
    stops = worker.state.stops()
    assert stops is not None
    assert stops.position.tolist() == [NEVER]
    worker.forward([("steered", 3, 5), ("r", 10, 11)], both)
    stops = worker.state.stops()
    assert stops is not None
    assert (stops.position.tolist(), stops.gate.tolist()) == ([10], [0])
    torch.testing.assert_close(stops.activation, f[10, fires[:1]])
    # Computed again, in one pass with those before it: the same answer.
    worker.forward([("r", 6, 11)], both)
    stops = worker.state.stops()
    assert stops is not None
    assert stops.position.tolist() == [10]
    assert worker.state.stops() is None
    worker.forward([("steered", 5, 6)], both)
    assert worker.state.stops() is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_passed_token_that_fires_when_it_is_computed_again_hides_no_later_one(
    saes: list[SAE], kernel: str
) -> None:
    quiet = [torch.zeros(LENGTH, D_MODEL) for _ in saes]
    fires = quiet[0].clone()
    fires[[9, 12]] = 20 * saes[0].rows([3]).W_enc[0]
    gate = PlannedGate(0, 3, GATE_ABOVE, 5.0, SCOPE_STOP)
    worker = TinyWorker(saes, KERNELS[kernel])
    gated = SteeringPlan("k", 1, PROMPT, (), True, False, None, gates=(gate,))
    worker.state.add_request("r", gated)
    worker.forward([("r", 0, 12)], {"r": quiet})
    worker.state.pause_request("r")
    worker.state.add_request("r", gated)
    found = []
    # By chunks; the last token alone is new.
    for start, stop in ((0, 10), (10, 12), (12, 13)):
        worker.forward([("r", start, stop)], {"r": [fires, quiet[1]]})
        stops = worker.state.stops()
        assert stops is not None
        found.append(int(stops.position[0]))
    assert found == [9, NEVER, 12]
    worker.state.pause_request("r")
    worker.state.add_request("r", gated)
    worker.forward([("r", 0, 13)], {"r": [fires, quiet[1]]})
    stops = worker.state.stops()
    assert stops is not None
    assert stops.position.tolist() == [12]
