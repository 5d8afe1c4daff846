"""What studies read in a worker: activations summed up over texts, and changes between two runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.sae import SAE, open_sae
from sae.source import ResolvedSAE
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SPECIAL,
    OP_ADD,
    OP_CLAMP,
    PlannedEdit,
    PlannedGate,
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
from steering.studies.changes import Changes
from steering.studies.reading import Pooled
from steering.worker import batch_parts, changes, pass_reports
from steering.worker.ops import cpu_kernel
from tests.engine.reference import ReferenceSAE
from tests.models import D_MODEL, make_tiny_sae
from tests.steering.tiny_worker import ORDINARY, SPECIAL, TinyWorker, tied_sae

PROMPT, LENGTH = 5, 12
EVERYWHERE = COVERS_PROMPT | COVERS_GENERATION
ALL = Window(EVERYWHERE, 0, LENGTH)
NO_EDITS = SteeringSpec((), Positions(), True, False, None)


@dataclass(frozen=True)
class Opened:
    """An SAE, and an independent one of the same files."""

    sae: SAE
    reference: ReferenceSAE

    @property
    def d_sae(self) -> int:
        return self.sae.card.d_sae


def opened(path: Path, name: str, sink_norm: float | None = None) -> Opened:
    ref = ResolvedSAE(name, str(path), path=str(path), sink_norm=sink_norm)
    return Opened(open_sae(ref), ReferenceSAE(path, sink_norm))


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> list[Opened]:
    """JumpReLU at layer 1, TopK at layer 2, and there one whose input is normalised."""
    folder = tmp_path_factory.mktemp("saes")
    tied_sae(folder / "jumprelu", layer=1)
    make_tiny_sae(folder / "topk", architecture="topk", layer=2, seed=5, k=24)
    make_tiny_sae(
        folder / "normed",
        layer=2,
        seed=6,
        config={"normalize_activations": "layer_norm"},
        threshold=0.2,
    )
    return [opened(folder / name, name) for name in ("jumprelu", "topk", "normed")]


@pytest.fixture
def worker(saes: list[Opened]) -> TinyWorker:
    return TinyWorker([one.sae for one in saes], cpu_kernel)


def plan(key: str, *probes: Any, edits: tuple[PlannedEdit, ...] = (), **more: Any) -> SteeringPlan:
    made = SteeringPlan(key, 1, PROMPT, edits, True, False, None, probes=probes)
    return replace(made, **more)


def pool(sae: int = 0, kind: str = "mean", **more: Any) -> PlannedPool:
    return replace(PlannedPool(sae, (ALL,), kind, scaled=False, peaks=False), **more)


def streams(seed: int, length: int = LENGTH) -> list[Tensor]:
    """At layers 1 and 2."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(length, D_MODEL, generator=rng) * 2 for _ in range(2)]


def in_parts(*bounds: int) -> list[tuple[int, int]]:
    return list(pairwise(bounds))


def summed(
    worker: TinyWorker, key: str, probe: PlannedPool, opened: Opened, limit: int = LENGTH
) -> Pooled:
    [summary] = worker.state.take_results(key, {0: limit})
    asked = Pool("any", (), probe.pool)  # type: ignore[arg-type]
    return Pooled.of(summary["probed"][0], asked, opened.d_sae)


def check(found: Pooled, kind: str, f: Tensor) -> None:
    """Against the activations ``[tokens, d_sae]`` of those that take part."""
    f64 = f.double().numpy()
    assert found.tokens == len(f)
    np.testing.assert_array_equal(found.dense(found.count), (f64 > 0).sum(axis=0))
    np.testing.assert_allclose(found.dense(found.total), f64.sum(axis=0), rtol=1e-5, atol=1e-5)
    wanted = {"mean": f64.mean(axis=0), "max": f64.max(axis=0), "last": f64[-1]}[kind]
    np.testing.assert_allclose(found.dense(found.pooled), wanted, rtol=1e-5, atol=1e-5)


# --- pools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "max", "last"])
@pytest.mark.parametrize("sae", [0, 1, 2], ids=["jumprelu", "topk", "layer norm"])
@pytest.mark.parametrize("bounds", [(0, 12), (0, 1, 5, 7, 12), range(13)], ids=str)
def test_a_text_is_summed_up_alike_however_it_is_cut_into_passes(
    worker: TinyWorker, saes: list[Opened], kind: str, sae: int, bounds: tuple[int, ...]
) -> None:
    given = {"a": streams(1)}
    worker.state.add_request("a", plan("ka", pool(sae, kind)))
    for start, stop in in_parts(*bounds):
        [[first, second]] = worker.forward([("a", start, stop)], given)
        assert torch.equal(first, given["a"][0][start:stop])
        assert torch.equal(second, given["a"][1][start:stop])
    layer = 0 if sae == 0 else 1
    # The first token of a sequence takes no part.
    f = saes[sae].reference.encode(given["a"][layer][1:])
    check(summed(worker, "ka", pool(sae, kind), saes[sae]), kind, f)


@pytest.mark.parametrize("elements", [1, 3 * 3 * 128, 10**9])
def test_a_text_is_summed_up_alike_however_a_pass_is_cut_into_parts(
    worker: TinyWorker, saes: list[Opened], monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(batch_parts, "_WORKSPACE_ELEMENTS", elements)
    given = {"a": streams(1), "b": streams(2)}
    for name in "ab":
        worker.state.add_request(name, plan(f"k{name}", pool(1, "max")))
    worker.forward([("a", 0, 7), ("b", 0, LENGTH)], given)
    worker.forward([("a", 7, LENGTH)], given)
    for name in "ab":
        f = saes[1].reference.encode(given[name][1][1:])
        check(summed(worker, f"k{name}", pool(1, "max"), saes[1]), "max", f)


@pytest.mark.parametrize("kind", ["mean", "max", "last"])
def test_a_position_that_is_computed_again_after_a_preemption_counts_once(
    worker: TinyWorker, saes: list[Opened], kind: str
) -> None:
    given = {"a": streams(1), "other": streams(2)}
    its_plan = plan("ka", pool(0, kind))
    worker.state.add_request("a", its_plan)
    worker.forward([("a", 0, 7)], given)
    worker.state.pause_request("a")
    # Meanwhile another has its slot.
    worker.state.add_request("other", plan("ko", pool(0, kind)))
    worker.forward([("other", 0, LENGTH)], given)
    worker.state.remove_request("other")
    worker.state.add_request("a", its_plan)
    worker.forward([("a", 0, 4)], given)
    worker.forward([("a", 4, LENGTH)], given)
    for name in ("a", "other"):
        key = "ka" if name == "a" else "ko"
        f = saes[0].reference.encode(given[name][0][1:])
        check(summed(worker, key, pool(0, kind), saes[0]), kind, f)


def test_texts_side_by_side_with_steered_and_clean_ones_do_not_mix(
    worker: TinyWorker, saes: list[Opened]
) -> None:
    given = {name: streams(i) for i, name in enumerate("abcd")}
    worker.state.add_request("a", plan("ka", pool(0, "mean")))
    worker.state.add_request("b", plan("kb", pool(0, "last"), pool(1, "max")))
    edit = PlannedEdit(0, 3, OP_CLAMP, 5.0, EVERYWHERE, 0, 99)
    worker.state.add_request("d", plan("kd", edits=(edit,), report=True))
    for start, stop in in_parts(0, 5, LENGTH):
        parts = [(name, start, stop) for name in "cbda"]
        [clean, *_] = worker.forward(parts, given)
        assert torch.equal(clean[0], given["c"][0][start:stop])
        assert torch.equal(clean[1], given["c"][1][start:stop])
    check(
        summed(worker, "ka", pool(0, "mean"), saes[0]),
        "mean",
        saes[0].reference.encode(given["a"][0][1:]),
    )
    [both] = worker.state.take_results("kb", {0: LENGTH})
    for i, kind in enumerate(("last", "max")):
        asked = Pool("any", (), kind)  # type: ignore[arg-type]
        f = saes[i].reference.encode(given["b"][i][1:])
        check(Pooled.of(both["probed"][i], asked, saes[i].d_sae), kind, f)
    [steered] = worker.state.take_results("kd", {0: LENGTH})
    assert steered["edits"][0]["tokens_edited"] == LENGTH - 1
    assert "probed" not in steered


WINDOWS: dict[str, tuple[tuple[Window, ...], Callable[[int], bool]]] = {
    "prompt": ((Window(COVERS_PROMPT, 0, LENGTH),), lambda i: i < PROMPT),
    "completion": ((Window(COVERS_GENERATION, 0, LENGTH),), lambda i: i >= PROMPT),
    "before 8": ((Window(EVERYWHERE, 0, 8),), lambda i: i < 8),
    "of two": (
        (Window(COVERS_PROMPT, 3, 99), Window(EVERYWHERE, 4, 7)),
        lambda i: 3 <= i < PROMPT or 4 <= i < 7,
    ),
}


@pytest.mark.parametrize("which", WINDOWS)
def test_only_the_tokens_asked_for_take_part(
    worker: TinyWorker, saes: list[Opened], which: str
) -> None:
    windows, covers = WINDOWS[which]
    given, ids = {"a": streams(1)}, {"a": [ORDINARY] * LENGTH}
    ids["a"][4] = SPECIAL
    asked = pool(0, "max", windows=windows, peaks=True)
    worker.state.add_request("a", plan("ka", asked))
    for start, stop in in_parts(0, 6, LENGTH):
        worker.forward([("a", start, stop)], given, ids)
    taken = [i for i in range(1, LENGTH) if covers(i) and i != 4]
    f = saes[0].reference.encode(given["a"][0][taken])
    found = summed(worker, "ka", asked, saes[0])
    check(found, "max", f)
    assert found.peaks is not None
    positions, peaks = found.peaks
    assert positions.tolist() == taken
    np.testing.assert_allclose(peaks, f.amax(dim=1).numpy(), rtol=1e-5, atol=1e-5)


def test_special_tokens_take_part_where_they_are_asked_for(
    worker: TinyWorker, saes: list[Opened]
) -> None:
    given = {"a": streams(1)}
    asked = pool(0, windows=(Window(EVERYWHERE | COVERS_SPECIAL, 0, LENGTH),))
    worker.state.add_request("a", plan("ka", asked))
    worker.forward([("a", 0, LENGTH)], given, {"a": [SPECIAL] * LENGTH})
    check(summed(worker, "ka", asked, saes[0]), "mean", saes[0].reference.encode(given["a"][0]))


def test_sinks_take_no_part(tmp_path: Path) -> None:
    tied_sae(tmp_path / "sae", layer=1)
    one = opened(tmp_path / "sae", "sae", sink_norm=40.0)
    worker = TinyWorker([one.sae], cpu_kernel)
    given = {"a": streams(1)[:1]}
    given["a"][0][[3, 9]] *= 20
    worker.state.add_request("a", plan("ka", pool(0, "max")))
    worker.forward([("a", 0, LENGTH)], given)
    taken = [i for i in range(1, LENGTH) if i not in (3, 9)]
    check(
        summed(worker, "ka", pool(0, "max"), one), "max", one.reference.encode(given["a"][0][taken])
    )


def test_a_text_without_a_token_that_takes_part_has_nothing(
    worker: TinyWorker, saes: list[Opened]
) -> None:
    asked = pool(0, windows=(Window(COVERS_PROMPT, 0, 1),))
    worker.state.add_request("a", plan("ka", asked))
    worker.forward([("a", 0, LENGTH)], {"a": streams(1)})
    found = summed(worker, "ka", asked, saes[0])
    assert (found.tokens, len(found.features)) == (0, 0)


def test_scaled_sums_are_times_the_output_scale_of_each_token(
    worker: TinyWorker, saes: list[Opened]
) -> None:
    given = {"a": streams(1)}
    given["a"][1] *= torch.linspace(0.5, 3, LENGTH)[:, None]
    asked = pool(2, "max", scaled=True)
    worker.state.add_request("a", plan("ka", asked))
    worker.forward([("a", 0, LENGTH)], given)
    x = given["a"][1][1:]
    f, g = saes[2].reference.encode(x), saes[2].reference.output_scale(x)
    found = summed(worker, "ka", asked, saes[2])
    np.testing.assert_allclose(
        found.dense(found.total), (f * g).double().sum(dim=0).numpy(), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(found.dense(found.pooled), f.amax(dim=0).numpy(), rtol=1e-5)
    firing = f.double().sum(dim=0).numpy()
    np.testing.assert_allclose(found.dense(found.firing), firing, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kind", ["mean", "max", "last"])
def test_activations_that_are_not_finite_take_no_part(bad: float, kind: str) -> None:
    from steering.worker.pooled import Pooled as OnDevice

    made = OnDevice(pool(0, kind), 3, "cpu")
    f = torch.tensor([[1.0, bad, -2.0], [3.0, 0.5, bad], [2.0, bad, -1.0]])
    made.observe(torch.arange(3), torch.ones(3, dtype=torch.bool), f, None)
    found = Pooled.of(made.summary(), Pool("any", (), kind), 3)  # type: ignore[arg-type]
    assert found.dense(found.total).tolist() == [6.0, 0.5, -3.0]
    assert found.dense(found.count).tolist() == [3, 1, 0]
    wanted = {"mean": [2.0, 0.5 / 3, -1.0], "max": [3.0, 0.5, -1.0], "last": [2.0, 0.0, -1.0]}
    assert found.dense(found.pooled).tolist() == pytest.approx(wanted[kind])


def test_a_request_that_is_forgotten_leaves_nothing(worker: TinyWorker) -> None:
    probes = (pool(0), PlannedStream(0, (ALL,), "a text"))
    worker.state.add_request("a", plan("ka", *probes, awaited=True))
    worker.forward([("a", 0, LENGTH)], {"a": streams(1)})
    worker.state.remove_request("a")
    worker.state.take_results("ka", {0: 0})
    assert len(worker.state.records) == 0
    assert len(worker.state.probes.kept) == 0


# --- changes --------------------------------------------------------------------------------------

CLAMP = PlannedEdit(0, 3, OP_CLAMP, 5.0, EVERYWHERE, 0, 99)
ADD = PlannedEdit(0, 9, OP_ADD, -1.5, COVERS_GENERATION, 0, 99)


def keep_stream(sae: int, key: str, *windows: Window) -> PlannedStream:
    return PlannedStream(sae, windows or (ALL,), key)


def run(
    worker: TinyWorker,
    key: str,
    given: list[Tensor],
    bounds: list[tuple[int, int]],
    saes: tuple[int, ...] = (0,),
    edits: tuple[PlannedEdit, ...] = (),
    **more: Any,
) -> list[Tensor]:
    """Run one text alone and fetch its results; the streams as its edits left them."""
    probes = [keep_stream(sae, key) for sae in saes]
    worker.state.add_request(key, plan(key, *probes, edits=edits, **more))
    made = [worker.forward([(key, start, stop)], {key: given})[0] for start, stop in bounds]
    worker.state.remove_request(key)
    worker.state.take_results(key, {0: len(given[0])})
    return [torch.cat(of_hook) for of_hook in zip(*made, strict=True)]


def compared(worker: TinyWorker, sae: Opened, index: int, edited: tuple[int, ...]) -> Changes:
    none = Changes.none("any", edited, sae.d_sae)
    [figures] = worker.state.probes.compare("clean", "steered", [index], 0, 999)
    assert figures is not None and figures["unmatched"] == 0
    return none.plus(figures)


def check_changes(
    found: Changes, sae: Opened, before: Tensor, after: Tensor, asked: float | None
) -> None:
    """Against the streams of the tokens that take part, ``[tokens, d_in]`` each."""
    f, f_new = sae.reference.encode(before).double(), sae.reference.encode(after).double()
    assert found.tokens == len(before)
    np.testing.assert_allclose(found.before, f.sum(dim=0).numpy(), 1e-5, 1e-5)
    np.testing.assert_allclose(found.after, f_new.sum(dim=0).numpy(), 1e-5, 1e-5)
    others = [i for i in range(sae.d_sae) if i not in found.edited]
    fires, fires_new = f[:, others] > 0, f_new[:, others] > 0
    assert found.newly_active == int((fires_new & ~fires).sum())
    assert found.silenced == int((fires & ~fires_new).sum())
    change = f_new - f
    assert found.others == pytest.approx(float(change[:, others].square().sum()), rel=1e-4)
    if asked is not None:
        assert found.asked == pytest.approx(asked, rel=1e-4)
    of_stream = (after - before).double()
    decoded = sae.reference.decode(f_new.float(), after) - sae.reference.decode(f.float(), before)
    assert found.stream == pytest.approx(float(of_stream.square().sum()), rel=1e-4)
    left = float((of_stream - decoded).square().sum())
    assert found.unexplained == pytest.approx(left, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("bounds", [(0, 12), (0, 1, 5, 7, 12)], ids=str)
@pytest.mark.parametrize("elements", [1, 3 * 128, 2**22])
def test_changes_are_those_of_the_edited_stream_however_it_is_cut(
    worker: TinyWorker,
    saes: list[Opened],
    monkeypatch: pytest.MonkeyPatch,
    bounds: tuple[int, ...],
    elements: int,
) -> None:
    monkeypatch.setattr(changes, "_BLOCK_ELEMENTS", elements)
    given = streams(1)
    run(worker, "clean", given, in_parts(0, LENGTH))
    after, _ = run(worker, "steered", given, in_parts(*bounds), edits=(CLAMP, ADD))
    x = given[0][1:]
    f = saes[0].reference.encode(x)[:, [3, 9]].double()
    # The second edit covers what comes after the prompt.
    asked = float((5.0 - f[:, 0]).square().sum()) + 1.5**2 * (LENGTH - PROMPT)
    found = compared(worker, saes[0], 0, (3, 9))
    check_changes(found, saes[0], x, after[1:], asked)
    entry = found.to_json(3, lambda i: f"feature {i}")
    assert [one["feature"] for one in entry["edited"]] == [3, 9]
    assert entry["leak"] == pytest.approx(math.sqrt(found.others / asked), rel=1e-4)
    assert len(entry["moved"]) == 3
    size = np.abs(found.after - found.before)
    size[[3, 9]] = 0
    assert [one["feature"] for one in entry["moved"]] == np.argsort(-size)[:3].tolist()
    assert entry["moved"][0]["label"] == f"feature {np.argmax(size)}"


def test_several_saes_are_compared_from_one_run_each_with_its_own_edits(
    worker: TinyWorker, saes: list[Opened]
) -> None:
    edits = (CLAMP, PlannedEdit(1, 7, OP_ADD, 3.0, EVERYWHERE, 0, 99))
    given, other = streams(1), streams(2)
    run(worker, "clean", given, in_parts(0, LENGTH), (0, 1, 2))
    # What earlier edits make of a later stream is given here: another stream.
    moved = [given[0], given[1] + 0.1 * other[1]]
    after = run(worker, "steered", moved, in_parts(0, 5, LENGTH), (0, 1, 2), edits)
    f = saes[0].reference.encode(given[0][1:])[:, 3].double()
    asked = {0: float((5.0 - f).square().sum()), 1: 9.0 * (LENGTH - 1), 2: 0.0}
    for index, edited in enumerate([(3,), (7,), ()]):
        layer = min(index, 1)
        found = compared(worker, saes[index], index, edited)
        check_changes(found, saes[index], given[layer][1:], after[layer][1:], asked[index])
        assert (found.to_json(1, str)["leak"] is None) == (not edited)


def test_a_recomputed_position_replaces_itself_and_a_recycled_slot_knows_nothing(
    worker: TinyWorker, saes: list[Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_reports, "_MOST_COPIES", 2)
    given, other = streams(1), streams(3)
    run(worker, "other", other, in_parts(0, LENGTH))
    run(worker, "clean", given, in_parts(0, LENGTH))
    its_plan = plan("steered", keep_stream(0, "steered"), edits=(CLAMP,))
    worker.state.add_request("a", its_plan)
    worker.forward([("a", 0, 8)], {"a": given})
    worker.state.pause_request("a")
    run(worker, "between", other, in_parts(0, LENGTH))
    worker.state.add_request("a", its_plan)
    after = [
        worker.forward([("a", start, stop)], {"a": given})[0][0]
        for start, stop in in_parts(0, 3, 9, LENGTH)
    ]
    worker.state.take_results("steered", {0: LENGTH})
    found = compared(worker, saes[0], 0, (3,))
    check_changes(found, saes[0], given[0][1:], torch.cat(after)[1:], None)


def test_asked_is_what_the_edits_make_of_what_they_read_where_they_are_open(
    worker: TinyWorker, saes: list[Opened]
) -> None:
    given = streams(1)
    run(worker, "clean", given, in_parts(0, LENGTH))
    gate = PlannedGate(0, 20, 0, 0.0, 0)  # fires at the token itself
    edit = replace(CLAMP, gates=1)
    run(worker, "steered", given, in_parts(0, LENGTH), edits=(edit,), gates=(gate,))
    f = saes[0].reference.encode(given[0][1:]).double()
    held = f[:, 20] <= 0
    assert 0 < int(held.sum()) < LENGTH - 1
    asked = float((5.0 - f[~held, 3]).square().sum())
    assert compared(worker, saes[0], 0, (3,)).asked == pytest.approx(asked, rel=1e-4)


def test_with_reread_what_is_asked_is_the_change_of_the_activation(
    worker: TinyWorker, saes: list[Opened]
) -> None:
    given = streams(1)
    run(worker, "clean", given, in_parts(0, LENGTH))
    after, _ = run(worker, "steered", given, in_parts(0, LENGTH), edits=(CLAMP,), reread=True)
    f = saes[0].reference.encode(given[0][1:])[:, 3].double()
    found = compared(worker, saes[0], 0, (3,))
    check_changes(found, saes[0], given[0][1:], after[1:], float((5.0 - f).square().sum()))
    assert found.after[3] == pytest.approx(5.0 * (LENGTH - 1), rel=1e-4)


def test_completions_behind_different_prompts_are_compared_token_by_token(
    worker: TinyWorker, saes: list[Opened]
) -> None:
    longer = 3
    completion = Window(COVERS_GENERATION, 0, 99)
    short, long = streams(1), streams(2, LENGTH + longer)
    for key, given, prompt_len in (("clean", short, PROMPT), ("steered", long, PROMPT + longer)):
        its_plan = plan(key, keep_stream(0, key, completion), prompt_len=prompt_len)
        worker.state.add_request(key, its_plan)
        worker.forward([(key, 0, len(given[0]))], {key: given})
        worker.state.take_results(key, {0: len(given[0])})
        worker.state.remove_request(key)
    found = compared(worker, saes[0], 0, ())
    check_changes(found, saes[0], short[0][PROMPT:], long[0][PROMPT + longer :], 0.0)


def test_tokens_that_were_sinks_unsteered_are_not_compared(tmp_path: Path) -> None:
    tied_sae(tmp_path / "sae", layer=1)
    one = opened(tmp_path / "sae", "sae", sink_norm=40.0)
    worker = TinyWorker([one.sae], cpu_kernel)
    given = streams(1)[:1]
    given[0][4] *= 20
    run(worker, "clean", given, in_parts(0, LENGTH))
    # An edit may make any token's norm larger than a sink's.
    huge = replace(CLAMP, value=500.0)
    (after,) = run(worker, "steered", given, in_parts(0, LENGTH), edits=(huge,))
    taken = [i for i in range(1, LENGTH) if i != 4]
    check_changes(compared(worker, one, 0, (3,)), one, given[0][taken], after[taken], None)


def test_what_is_compared_in_pieces_adds_up(worker: TinyWorker, saes: list[Opened]) -> None:
    given = streams(1)
    run(worker, "clean", given, in_parts(0, LENGTH))
    run(worker, "steered", given, in_parts(0, LENGTH), edits=(CLAMP,))
    whole = compared(worker, saes[0], 0, (3,))
    found = Changes.none("any", (3,), saes[0].d_sae)
    for start in range(0, LENGTH, 4):
        [figures] = worker.state.probes.compare("clean", "steered", [0], start, start + 4)
        assert figures is not None
        found = found.plus(figures)
    assert found.tokens == whole.tokens == LENGTH - 1
    np.testing.assert_allclose(found.after, whole.after, rtol=1e-6, atol=1e-6)
    for name in ("newly_active", "silenced"):
        assert getattr(found, name) == getattr(whole, name)
    for name in ("others", "asked", "stream", "unexplained"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-6)


def test_a_run_that_changes_nothing_moves_nothing(worker: TinyWorker, saes: list[Opened]) -> None:
    given = streams(1)
    for key in ("clean", "steered"):
        run(worker, key, given, in_parts(0, LENGTH))
    found = compared(worker, saes[0], 0, ())
    assert np.array_equal(found.before, found.after)
    entry = found.to_json(5, str)
    assert (entry["moved"], entry["newly_active"], entry["silenced"]) == ([], 0, 0)
    assert (entry["leak"], entry["explained"]) == (None, None)


def test_a_token_that_the_unsteered_run_lacks_is_told(worker: TinyWorker) -> None:
    given = streams(1)
    run(worker, "clean", [stream[:9] for stream in given], in_parts(0, 9))
    run(worker, "steered", given, in_parts(0, LENGTH))
    [figures] = worker.state.probes.compare("clean", "steered", [0], 0, 999)
    assert figures is not None and figures["unmatched"] == 3
    assert worker.state.probes.compare("nobody", "steered", [0], 0, 999) == [None]


def test_released_streams_are_gone(worker: TinyWorker) -> None:
    for key in ("clean", "steered"):
        run(worker, key, streams(1), in_parts(0, LENGTH), (0, 1))
    assert len(worker.state.probes.kept) == 2
    assert worker.state.probes.kept.nbytes > 4 * LENGTH * D_MODEL * 4 * 0.9
    worker.state.probes.kept.forget(["clean", "unknown"])
    assert worker.state.probes.compare("clean", "steered", [0], 0, 9) == [None]
    worker.state.probes.kept.forget(["steered"])
    assert worker.state.probes.kept.nbytes == 0


# --- plans ----------------------------------------------------------------------------------------


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


def test_a_passes_copies_are_taken_apart_once_they_are_many_bytes(
    worker: TinyWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_reports, "_MOST_BYTES", 4 * D_MODEL * 3)
    worker.state.add_request("a", plan("ka", keep_stream(0, "a text")))
    given = {"a": streams(1)}
    for start, stop in in_parts(*range(0, LENGTH + 1, 4)):
        worker.forward([("a", start, stop)], given)
        assert len(worker.state.reports._copies) == 1
    worker.state.take_results("ka", {0: LENGTH})
    kept = worker.state.probes.kept.get("a text", 0)
    assert kept is not None
    np.testing.assert_array_equal(kept.x, given["a"][0][1:].numpy())
