"""The worker's state without vLLM: what enters and leaves it, and what a pass leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.sae import SAE, open_sae
from sae.source import ResolvedSAE
from steering.report import features_read
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    GATE_ABOVE,
    OP_ADD,
    OP_CLAMP,
    SCOPE_PROMPT,
    SCOPE_STOP,
    SCOPE_TOKEN,
    PlannedEdit,
    PlannedGate,
    PlannedRead,
    SteeringPlan,
)
from steering.worker import pass_reports
from steering.worker.ops import cpu_kernel
from steering.worker.ops.layout import NEVER, NO_SLOT
from steering.worker.probes import strongest
from tests.models import D_MODEL, make_tiny_sae
from tests.steering.tiny_worker import TinyWorker, tied_sae

EVERYWHERE = COVERS_PROMPT | COVERS_GENERATION
PROMPT = 6
LENGTH = 12
CLAMP = PlannedEdit(0, 3, OP_CLAMP, 5.0, EVERYWHERE, 0, 99)
READ = PlannedRead(1, 4, EVERYWHERE, 0, 99, None)


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> list[SAE]:
    """Exact from rows at layer 1, TopK at layer 2."""
    folder = tmp_path_factory.mktemp("saes")
    path = make_tiny_sae(folder / "topk", architecture="topk", layer=2, seed=5, k=32)
    return [
        tied_sae(folder / "jumprelu", layer=1),
        open_sae(ResolvedSAE("topk", str(path), path=str(path))),
    ]


@pytest.fixture
def worker(saes: list[SAE]) -> TinyWorker:
    return TinyWorker(saes, cpu_kernel)


def plan(key: str = "k", **more: Any) -> SteeringPlan:
    return replace(SteeringPlan(key, 1, PROMPT, (CLAMP,), True, True, None), **more)


def streams(seed: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(LENGTH, D_MODEL, generator=rng) * 2 for _ in range(2)]


def test_requests_share_a_pass_and_each_has_its_own_record(
    worker: TinyWorker, saes: list[SAE]
) -> None:
    given = {name: streams(i) for i, name in enumerate("abc")}
    worker.state.add_request("a", plan("ka"))
    worker.state.add_request("b", plan("kb", edits=(CLAMP, replace(CLAMP, latent=9))))
    for start, stop in ((0, 4), (4, 6), *((t, t + 1) for t in range(6, LENGTH))):
        parts = [(name, start, stop) for name in ("b", "c", "a")]
        _, [clean, _], _ = worker.forward(parts, given)
        assert torch.equal(clean, given["c"][0][start:stop])
    for name, latents in (("a", [3]), ("b", [3, 9])):
        [summary] = worker.state.take_results(f"k{name}", {0: LENGTH - 1})
        f = saes[0].activations(given[name][0][1 : LENGTH - 1], latents)
        for entry, its_f in zip(summary["edits"], f.T, strict=True):
            assert entry["tokens_edited"] == LENGTH - 2
            assert entry["max_activation"] == pytest.approx(float(its_f.max()), rel=1e-4)
            assert entry["mean_activation"] == pytest.approx(float(its_f.mean()), rel=1e-4)
        [edited] = summary["edited"]
        assert edited["tokens"] == LENGTH - 2
        assert summary["cached"] == 0


@pytest.mark.parametrize("held", [1, 5, 1000])
def test_records_are_the_same_however_long_copies_are_kept_whole(
    worker: TinyWorker, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(pass_reports, "_MOST_COPIES", held)
    given = {"a": streams(0), "b": streams(1)}
    worker.state.add_request("a", plan("ka", read=READ))
    worker.state.add_request("b", plan("kb"))
    for t in range(LENGTH):
        worker.forward([("a", t, t + 1), ("b", t, t + 1)], given)
    [summary] = worker.state.take_results("ka", {0: LENGTH})
    assert summary["edits"][0]["tokens_edited"] == LENGTH - 1
    assert [position for position, _ in features_read(summary["read"])] == list(range(1, LENGTH))
    # The other one's rows are still there.
    [other] = worker.state.take_results("kb", {0: LENGTH})
    assert other["edits"][0]["tokens_edited"] == LENGTH - 1


def test_what_a_later_pass_found_replaces_what_an_earlier_one_did_on_either_path(
    worker: TinyWorker,
) -> None:
    # A rejected token is computed in the kernel; a neighbour's read then moves the pass to torch.
    given = {"a": streams(0), "other": streams(1)}
    worker.state.add_request("a", plan())
    worker.forward([("a", 0, 8)], given)
    worker.state.add_request("other", plan("ko", edits=(), report=False, read=READ))
    accepted = {**given, "a": streams(2)}
    worker.forward([("a", 7, 8), ("other", 0, 3)], accepted)
    [summary] = worker.state.take_results("k", {0: 8})
    f = torch.cat([given["a"][0][1:7], accepted["a"][0][7:8]])
    wanted = worker.state._saes[0].activations(f, [3])
    assert summary["edits"][0]["max_activation"] == pytest.approx(float(wanted.max()), rel=1e-4)
    assert summary["edits"][0]["mean_activation"] == pytest.approx(float(wanted.mean()), rel=1e-4)


def test_reads_of_all_requests_are_ranked_together_and_told_apart(
    worker: TinyWorker, saes: list[SAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = []

    def counting(f: Tensor, k: int) -> Any:
        ranked.append(k)
        return strongest(f, k)

    monkeypatch.setattr("steering.worker.full_path.strongest", counting)
    given = {"a": streams(0), "b": streams(1)}
    worker.state.add_request("a", plan("ka", edits=(), report=False, read=READ))
    narrow = replace(READ, top_k=2, coverage=COVERS_PROMPT)
    worker.state.add_request("b", plan("kb", edits=(), report=False, read=narrow))
    worker.forward([("a", 0, 8), ("b", 0, 8)], given)
    assert ranked == [4]
    for name, top_k, positions in (("a", 4, range(1, 8)), ("b", 2, range(1, PROMPT))):
        [summary] = worker.state.take_results(f"k{name}", {0: 8})
        f = saes[1].encode(given[name][1])
        for position, features in features_read(summary["read"]):
            best = f[position].sort(descending=True, stable=True).indices[:top_k].tolist()
            assert [latent for latent, _ in features] == best
        assert [p for p, _ in features_read(summary["read"])] == list(positions)


@pytest.mark.parametrize(
    ("what", "until"),
    [
        ({"read": replace(READ, coverage=COVERS_PROMPT)}, PROMPT),
        ({"read": replace(READ, end=8)}, 8),
        ({"edits": (replace(CLAMP, sae=1, coverage=COVERS_PROMPT),)}, PROMPT),
        ({"edits": (replace(CLAMP, sae=1),)}, LENGTH),
        ({"gates": (PlannedGate(1, 3, GATE_ABOVE, 0.0, SCOPE_PROMPT),)}, PROMPT),
        ({"gates": (PlannedGate(1, 3, GATE_ABOVE, 0.0, SCOPE_STOP),)}, LENGTH),
        ({"edits": (replace(CLAMP, end=9, gates=1),),
          "gates": (PlannedGate(1, 3, GATE_ABOVE, 0.0, SCOPE_TOKEN),)}, 9),
        ({"edits": (replace(CLAMP, coverage=COVERS_PROMPT),), "error_term": False}, PROMPT),
        ({}, 0),
    ],
)  # fmt: skip
def test_a_request_needs_whole_encodes_until_its_last_position_that_does(
    worker: TinyWorker, what: dict[str, Any], until: int
) -> None:
    given = {"a": streams(0)}
    worker.state.add_request("a", plan(**what))
    reached = 0
    for start, stop in ((0, 4), (4, 6), *((t, t + 1) for t in range(6, LENGTH))):
        assert worker.state.needs_full(["a"]) == (start < until), start
        worker.forward([("a", start, stop)], given)
        reached = stop
    assert reached == LENGTH
    # Preempted, all of it is computed again.
    worker.state.pause_request("a")
    worker.state.add_request("a", plan(**what))
    assert worker.state.needs_full(["a"]) == (until > 0)


def test_a_request_whose_passes_are_speculative_is_encoded_until_it_is_surely_past(
    worker: TinyWorker,
) -> None:
    given = {"a": streams(0)}
    worker.state.add_request("a", plan(read=replace(READ, end=8)))
    worker.forward([("a", 0, PROMPT)], given)
    worker.forward([("a", 6, 9)], given)  # all but the first may be rejected
    assert worker.state.needs_full(["a"])
    worker.forward([("a", 7, 10)], given)
    assert not worker.state.needs_full(["a"])
    [summary] = worker.state.take_results("k", {0: 10})
    assert [position for position, _ in features_read(summary["read"])] == list(range(1, 8))


def test_an_edit_made_in_a_whole_encode_stays_as_it_was_once_it_is_past(
    saes: list[SAE],
) -> None:
    # Behind the prompt the other edit goes on in the kernel; this one covers nothing there.
    edits = (CLAMP, replace(CLAMP, sae=1, latent=7, coverage=COVERS_PROMPT))
    given = {"a": streams(0)}
    with_kernel, in_torch = TinyWorker(saes, cpu_kernel), TinyWorker(saes, None)
    for each in (with_kernel, in_torch):
        each.state.add_request("a", plan(edits=edits))
    for start, stop in ((0, PROMPT), (6, 7), (7, 10)):
        [[first, second]] = with_kernel.forward([("a", start, stop)], given)
        [[wanted, also]] = in_torch.forward([("a", start, stop)], given)
        torch.testing.assert_close(first, wanted)
        torch.testing.assert_close(second, also)
        assert torch.equal(second, given["a"][1][start:stop]) == (start >= PROMPT)


def test_a_prompts_decision_survives_a_preemption_where_it_is_read_at_a_later_layer(
    saes: list[SAE],
) -> None:
    given = streams(0)
    f = saes[1].encode(given[1])[1:PROMPT]
    latent = int(f.amax(dim=0).argmax())
    gated = plan(
        edits=(replace(CLAMP, op=OP_ADD, coverage=COVERS_GENERATION, gates=1),),
        gates=(PlannedGate(1, latent, GATE_ABOVE, 0.0, SCOPE_PROMPT),),
    )
    worker = TinyWorker(saes, cpu_kernel)
    worker.state.add_request("a", gated)
    worker.forward([("a", 0, PROMPT)], {"a": given})
    worker.state.pause_request("a")
    worker.state.pause_request("a")  # V1 says so twice
    worker.state.add_request("intruder", plan())
    worker.state.add_request("a", gated)
    [[hidden, _]] = worker.forward([("a", 0, LENGTH)], {"a": given})
    changed = (hidden != given[0]).any(dim=1)
    assert changed.tolist() == [False] * PROMPT + [True] * (LENGTH - PROMPT)


def test_a_request_that_ends_while_it_is_preempted_leaves_nothing(worker: TinyWorker) -> None:
    gated = plan(gates=(PlannedGate(0, 3, GATE_ABOVE, 0.0, SCOPE_STOP),))
    worker.state.add_request("a", gated)
    worker.state.pause_request("a")
    worker.state.remove_request("a")
    worker.state.add_request("a", gated)  # another one of the same name
    slot = worker.state.slot_of("a")
    assert (worker.state._gate_state.first_held[slot] == NEVER).all()
    worker.state.remove_request("a")
    assert worker.state.slots.in_use == 0
    assert worker.state.rows.rows_in_use == 0
    assert worker.state._paused_gates == {}


def test_where_graphs_hold_the_op_a_gated_pass_leaves_no_slot_behind(saes: list[SAE]) -> None:
    worker = TinyWorker(saes, cpu_kernel)
    worker.state._always_launch = True
    gated = plan(gates=(PlannedGate(0, 3, GATE_ABOVE, 0.0, SCOPE_STOP),))
    worker.state.add_request("a", gated)
    worker.forward([("a", 0, 4)], {"a": streams(0)})
    assert (worker.state.step.token_slot == NO_SLOT).all()
    held = worker.state._gate_state.first_held.clone()
    worker.state.apply_at(worker.hooks[0], streams(1)[0], None)  # a replay for nobody
    assert torch.equal(worker.state._gate_state.first_held, held)
    [[hidden, _]] = worker.forward([("a", 4, 6)], {"a": streams(0)})
    assert not torch.equal(hidden, streams(0)[0][4:6])


def test_what_streams_is_handed_out_pass_by_pass_and_is_whole_in_the_end(
    worker: TinyWorker,
) -> None:
    given = {"a": streams(0), "b": streams(1)}
    streaming = replace(READ, stream=True)
    worker.state.add_request("a", plan("ka", edits=(), report=False, read=streaming), child=2)
    worker.state.add_request("b", plan("kb", edits=(), report=False, read=READ))
    assert worker.state.take_streamed(worker.state.records.streaming()) == {}
    got = []
    for start, stop in ((0, PROMPT), (6, 8), (7, 8)):
        worker.forward([("a", start, stop), ("b", start, stop)], given)
        [part] = worker.state.take_streamed(worker.state.records.streaming()).values()
        assert (part.key, part.child) == ("ka", 2)
        got.append(part.positions.tolist())
        assert part.covered.tolist() == [position != 0 for position in part.positions]
    assert got == [[0, 1, 2, 3, 4, 5], [6, 7], [7]]
    assert worker.state.take_streamed(worker.state.records.streaming()) == {}
    worker.state.remove_request("a")
    [summary] = worker.state.take_results("ka", {2: 8})
    assert [position for position, _ in features_read(summary["read"])] == list(range(1, 8))


def test_an_internal_request_is_counted_nowhere(worker: TinyWorker) -> None:
    fit = PlannedRead(0, 1, EVERYWHERE, 0, 99, None, fit=True)
    own = plan(edits=(), report=False, read=fit, internal=True)
    worker.state.add_request("check", own)
    worker.forward([("check", 0, LENGTH)], {"check": streams(0)})
    stats = worker.state.take_stats()
    assert (stats["slots_in_use"], stats["results_held"], stats["op_seconds"]) == (0, 0, 0.0)
    [summary] = worker.state.take_results("k", {0: LENGTH})
    assert summary["read"] is None
    assert summary["measured"]["tokens"] == LENGTH - 1


def test_a_text_is_totalled_over_its_covered_tokens(worker: TinyWorker, saes: list[SAE]) -> None:
    for aggregate in ("max", "mean", "frequency"):
        read = PlannedRead(0, 3, COVERS_PROMPT, 0, 99, aggregate)
        totalled = plan(edits=(), report=False, read=read)
        worker.state.add_request("a", totalled)
        given = streams(4)
        worker.forward([("a", 0, 4)], {"a": given})
        worker.forward([("a", 2, PROMPT)], {"a": given})  # two of them again
        worker.state.remove_request("a")
        [summary] = worker.state.take_results("k", {0: PROMPT})
        f = saes[0].encode(given[0])[1:PROMPT].numpy()
        score = {"max": f.max(0), "mean": f.mean(0), "frequency": (f > 0).mean(0)}[aggregate]
        best = np.argsort(-score, kind="stable")[:3]
        assert [latent for latent, _ in summary["aggregate"]] == best.tolist()
        assert [s for _, s in summary["aggregate"]] == pytest.approx(score[best].tolist(), rel=1e-5)


def test_error_term_false_replaces_only_what_an_edit_touches_in_one_decode(
    saes: list[SAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = TinyWorker([saes[0]], cpu_kernel)
    decodes = []
    decode = SAE.decode

    def counting(self: SAE, f: Tensor, x: Tensor) -> Tensor:
        decodes.append(len(f))
        return decode(self, f, x)

    monkeypatch.setattr(SAE, "decode", counting)
    whole = plan(error_term=False, edits=(replace(CLAMP, start=2, end=4),))
    worker.state.add_request("a", whole)
    worker.state.add_request("b", replace(whole, key="kb"))
    given = {name: streams(i)[:1] for i, name in enumerate("ab")}
    made = worker.forward([("a", 0, PROMPT), ("b", 0, PROMPT)], given)
    assert decodes == [2 * PROMPT]
    for name, [hidden] in zip("ab", made, strict=True):
        x = given[name][0][:PROMPT]
        f = saes[0].encode(x)
        f[:, 3] = 5.0
        wanted = decode(saes[0], f, x)
        torch.testing.assert_close(hidden[2:4], wanted[2:4], rtol=1e-4, atol=1e-4)
        assert torch.equal(hidden[[0, 1, 4, 5]], x[[0, 1, 4, 5]])


def test_a_slot_that_another_request_took_over_is_edited_at_its_own_hook_points(
    worker: TinyWorker, saes: list[SAE]
) -> None:
    # The batch looks the same to the layout: one slot, as many tokens.
    given = streams(0)
    for key, sae in (("a", 0), ("b", 1), ("c", 0)):
        [latent] = saes[sae].encode(given[sae][2:3]).argmax(dim=-1).tolist()
        edit = replace(CLAMP, sae=sae, latent=latent)
        worker.state.add_request(key, plan(f"k{key}", edits=(edit,)))
        [made] = worker.forward([(key, 2, 3)], {key: given})
        for i in range(2):
            assert torch.equal(made[i], given[i][2:3]) == (i != sae)
        worker.state.remove_request(key)


def test_hook_points_where_a_batch_has_nothing_to_do_are_not_gone_into(
    worker: TinyWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited = []
    for hook, site in worker.state.hooks.items():
        monkeypatch.setattr(site, "apply", lambda *_, hook=hook: visited.append(hook))
    given = {"a": streams(0), "b": streams(1)}
    worker.forward([("b", 0, 2)], given)
    assert visited == []
    worker.state.add_request("a", plan())
    worker.forward([("a", 0, 2), ("b", 2, 4)], given)
    worker.forward([("b", 4, 5)], given)
    assert visited == worker.hooks[:1]
    worker.state.add_request("b", plan("kb", read=READ))
    worker.forward([("b", 5, 6)], given)
    assert visited == [worker.hooks[0], *worker.hooks]


@pytest.mark.parametrize("kernel", [cpu_kernel, None], ids=["kernel", "torch"])
def test_tokens_past_the_vocabulary_are_ordinary_ones(saes: list[SAE], kernel: Any) -> None:
    # As images have in models that put them behind the text's tokens.
    worker = TinyWorker(saes, kernel)
    worker.state.add_request("a", plan())
    vocab_size = 100
    ids = [vocab_size + 128 * (t % 2) for t in range(LENGTH)]
    given = {"a": streams(0)}
    [[made, _]] = worker.forward([("a", 0, LENGTH)], given, {"a": ids})
    before = given["a"][0]
    assert torch.equal(made[0], before[0])
    assert bool((made[1:] != before[1:]).any(dim=1).all())
    [summary] = worker.state.take_results("k", {0: LENGTH})
    assert summary["edits"][0]["tokens_edited"] == LENGTH - 1
