"""What studies read in a worker: activations that are summed up over texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    COVERS_SPECIAL,
    OP_CLAMP,
    PlannedEdit,
)
from steering.request.probe import (
    Pool,
)
from steering.request.probe_plan import PlannedPool, Window
from steering.studies.reading import Pooled
from steering.worker import batch_parts
from steering.worker.ops import cpu_kernel
from tests.steering.study_texts import (
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
from tests.steering.tiny_worker import ORDINARY, SPECIAL, TinyWorker, tied_sae


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> list[Opened]:
    return three_saes(tmp_path_factory.mktemp("saes"))


@pytest.fixture
def worker(saes: list[Opened]) -> TinyWorker:
    return TinyWorker([one.sae for one in saes], cpu_kernel)


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


def test_the_size_of_a_record_grows_with_the_peaks_that_a_probe_keeps(worker: TinyWorker) -> None:
    worker.state.add_request("a", plan("ka", pool(0, peaks=True)))
    record = worker.state.records.running("a")
    assert record is not None
    sizes = []
    for start, stop in in_parts(0, 1, LENGTH):
        worker.forward([("a", start, stop)], {"a": streams(1)})
        sizes.append(record.nbytes)
    assert sizes[1] - sizes[0] >= (LENGTH - 1) * (8 + 4)  # a position and a peak for each token


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
