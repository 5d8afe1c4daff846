"""What studies read in a worker: changes of features between two runs whose streams are kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.request.plan import (
    COVERS_GENERATION,
    OP_ADD,
    OP_CLAMP,
    PlannedEdit,
    PlannedGate,
)
from steering.request.probe_plan import PlannedStream, Window
from steering.studies.changes import Changes
from steering.worker import changes, pass_reports
from steering.worker.ops import cpu_kernel
from tests.models import D_MODEL
from tests.steering.study_texts import (
    ALL,
    EVERYWHERE,
    LENGTH,
    PROMPT,
    Opened,
    in_parts,
    opened,
    plan,
    pool,
    streams,
    three_saes,
)
from tests.steering.tiny_worker import TinyWorker, tied_sae

CLAMP = PlannedEdit(0, 3, OP_CLAMP, 5.0, EVERYWHERE, 0, 99)
ADD = PlannedEdit(0, 9, OP_ADD, -1.5, COVERS_GENERATION, 0, 99)


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> list[Opened]:
    return three_saes(tmp_path_factory.mktemp("saes"))


@pytest.fixture
def worker(saes: list[Opened]) -> TinyWorker:
    return TinyWorker([one.sae for one in saes], cpu_kernel)


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


@pytest.mark.parametrize("beyond", [math.inf, math.nan])
def test_a_change_beyond_its_dtype_has_no_leak_and_explains_nothing(beyond: float) -> None:
    found = Changes("any", (3,), 1, np.zeros(4), np.zeros(4), others=2.0, asked=beyond)
    entry = replace(found, stream=beyond, unexplained=1.0).to_json(1, lambda _: None)
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
    worker.state.probes.kept.forget(["clean", "unknown"])
    assert worker.state.probes.compare("clean", "steered", [0], 0, 9) == [None]
    worker.state.probes.kept.forget(["steered"])
    assert len(worker.state.probes.kept) == 0


def test_a_request_that_is_forgotten_leaves_nothing(worker: TinyWorker) -> None:
    probes = (pool(0), PlannedStream(0, (ALL,), "a text"))
    worker.state.add_request("a", plan("ka", *probes, awaited=True))
    worker.forward([("a", 0, LENGTH)], {"a": streams(1)})
    worker.state.remove_request("a")
    worker.state.take_results("ka", {0: 0})
    assert len(worker.state.records) == 0
    assert len(worker.state.probes.kept) == 0


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
