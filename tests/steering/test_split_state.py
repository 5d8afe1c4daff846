"""The worker's state with dictionaries that read at one hook point and write at others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from steering.request.plan import (
    COVERS_PROMPT,
    GATE_ABOVE,
    OP_ADD,
    SCOPE_TOKEN,
    PlannedGate,
    PlannedRead,
    SteeringPlan,
)
from steering.worker.ops import cpu_kernel
from tests.models import D_MODEL
from tests.steering.split import (
    CLAMP,
    EVERYWHERE,
    LENGTH,
    PROMPT,
    READS,
    WRITES,
    Transcoder,
    streams,
)
from tests.steering.tiny_worker import TinyWorker, tied_sae


def plan(key: str = "k", **more: Any) -> SteeringPlan:
    return replace(SteeringPlan(key, 1, PROMPT, (CLAMP,), True, True, None), **more)


@pytest.fixture(params=[cpu_kernel, None], ids=["kernel", "torch"])
def kernel(request: pytest.FixtureRequest) -> Iterator[ModuleType | None]:
    yield request.param


CHUNKS = ((0, 4), (4, 6), *((t, t + 1) for t in range(6, LENGTH)))


def run(worker: TinyWorker, given: Sequence[Tensor]) -> list[Tensor]:
    """All passes of the request "a" beside an unsteered one: what each hook point made of it."""
    both = {"a": given, "b": streams(9, len(given))}
    made: list[list[Tensor]] = [[] for _ in given]
    for start, stop in CHUNKS:
        (clean, steered) = worker.forward([("b", start, stop), ("a", start, stop)], both)
        for i, stream in enumerate(steered):
            made[i].append(stream)
            assert torch.equal(clean[i], both["b"][i][start:stop])
    return [torch.cat(parts) for parts in made]


def test_a_transcoder_reads_one_stream_and_edits_another(
    tmp_path: Path, kernel: ModuleType | None
) -> None:
    sae = Transcoder(tmp_path, WRITES[:1], architecture="jumprelu")
    worker = TinyWorker([sae], kernel)
    assert worker.hooks == [READS, WRITES[0]]
    x, y = streams(0, 2)
    worker.state.add_request("a", plan())
    made_x, made_y = run(worker, [x, y])
    assert torch.equal(made_x, x)
    f = sae.encode(x)[:, 3]
    expected = y + (5.0 - f)[:, None] * sae.weights["W_dec"][3]
    expected[0] = y[0]
    torch.testing.assert_close(made_y, expected, rtol=1e-4, atol=1e-4)
    [summary] = worker.state.take_results("k", {0: LENGTH})
    [entry], [edited] = summary["edits"], summary["edited"]
    assert entry["tokens_edited"] == LENGTH - 1
    assert entry["max_activation"] == pytest.approx(float(f[1:].max()), abs=1e-4)
    assert edited["hook"] == WRITES[0]
    share = ((expected - y).norm(dim=1) / y.norm(dim=1))[1:]
    assert edited["mean_share"] == pytest.approx(float(share.mean()), rel=1e-3)


def test_a_cross_layer_transcoder_edits_every_later_place_with_rows_of_its_own(
    tmp_path: Path, kernel: ModuleType | None
) -> None:
    sae = Transcoder(tmp_path, WRITES, architecture="standard")
    worker = TinyWorker([sae], kernel)
    x, *ys = streams(0, 3)
    edits = (replace(CLAMP, writes=2), replace(CLAMP, latent=7, op=OP_ADD, value=2.0, writes=2))
    worker.state.add_request("a", plan(edits=edits, max_share=0.5))
    assert worker.state.rows.rows_in_use == 4
    _, *made = run(worker, [x, *ys])
    change = (5.0 - sae.encode(x)[:, 3])[:, None] * sae.weights["W_dec"][3]
    change += 2.0 * sae.weights["W_dec"][7]
    for factor, y, after in zip((1, 4), ys, made, strict=True):
        delta = factor * change
        share = delta.norm(dim=1) / y.norm(dim=1)
        delta *= (0.5 / share).clamp(max=1)[:, None]
        delta[0] = 0
        torch.testing.assert_close(after, y + delta, rtol=1e-4, atol=1e-4)
    [summary] = worker.state.take_results("k", {0: LENGTH})
    assert [entry["hook"] for entry in summary["edited"]] == list(WRITES)
    assert all(entry["tokens_edited"] == LENGTH - 1 for entry in summary["edits"])
    worker.state.remove_request("a")
    assert worker.state.rows.rows_in_use == 0


def test_a_condition_between_the_reading_and_the_writing_decides(
    tmp_path: Path, kernel: ModuleType | None
) -> None:
    # The stream where it writes decides, by an SAE that is read there.
    sae = Transcoder(tmp_path / "t", WRITES[:1], architecture="jumprelu")
    gate_sae = tied_sae(tmp_path / "g", layer=1)
    gate_sae._card = replace(gate_sae.card, hook=WRITES[0], reads=WRITES[0], writes=WRITES[:1])
    worker = TinyWorker([sae, gate_sae], kernel)
    x, y = streams(0, 2)
    fires = gate_sae.activations(y, [5])[:, 0] > 0.5
    fires[0] = False
    assert 0 < int(fires.sum()) < LENGTH - 1
    gate = PlannedGate(1, 5, GATE_ABOVE, 0.5, SCOPE_TOKEN)
    worker.state.add_request("a", plan(edits=(replace(CLAMP, gates=1),), gates=(gate,)))
    _, made = run(worker, [x, y])
    expected = y + (5.0 - sae.encode(x)[:, 3])[:, None] * sae.weights["W_dec"][3] * fires[:, None]
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(made[~fires], y[~fires])
    [summary] = worker.state.take_results("k", {0: LENGTH})
    [entry] = summary["edits"]
    assert entry["tokens_edited"] == int(fires.sum())
    assert entry["tokens_held_back"] == LENGTH - 1 - int(fires.sum())


def test_a_transcoders_feature_is_a_condition_where_it_is_read(
    tmp_path: Path, kernel: ModuleType | None
) -> None:
    sae = Transcoder(tmp_path, WRITES[:1], architecture="jumprelu")
    worker = TinyWorker([sae], kernel)
    x, y = streams(0, 2)
    fires = sae.encode(x)[:, 9] > 0
    fires[0] = False
    assert 0 < int(fires.sum()) < LENGTH - 1
    gate = PlannedGate(0, 9, GATE_ABOVE, 0.0, SCOPE_TOKEN)
    worker.state.add_request("a", plan(edits=(replace(CLAMP, gates=1),), gates=(gate,)))
    _, made = run(worker, [x, y])
    assert torch.equal((made != y).any(dim=1), fires)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_without_the_error_term_the_output_becomes_the_decoded_one(
    tmp_path: Path, kernel: ModuleType | None, architecture: str
) -> None:
    sae = Transcoder(tmp_path, WRITES[:1], architecture=architecture, k=8)
    worker = TinyWorker([sae], kernel)
    x, y = streams(0, 2)
    where = replace(CLAMP, start=3, end=8)
    worker.state.add_request("a", plan(edits=(where,), error_term=False))
    assert worker.state.needs_full(["a"])
    _, made = run(worker, [x, y])
    f = sae.encode(x)
    f[:, 3] = 5.0
    expected = y.clone()
    expected[3:8] = sae.decode(f, x)[3:8]
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(made[:3], y[:3])


@pytest.mark.parametrize("error_term", [True, False])
def test_what_is_computed_again_or_comes_from_the_cache_is_edited_alike_and_counted_once(
    tmp_path: Path, kernel: ModuleType | None, error_term: bool
) -> None:
    sae = Transcoder(tmp_path, WRITES[:1], architecture="topk", k=8)
    worker, cached = TinyWorker([sae], kernel), 4
    x, y = streams(0, 2)
    given = {"a": [x, y], "c": [x, y], "b": streams(5, 2)}
    f = sae.encode(x)
    change = (5.0 - f[:, 3])[:, None] * sae.weights["W_dec"][3]
    expected = y + change if error_term else sae.decode(f, x) + change
    expected[0] = y[0]
    worker.state.add_request("a", plan("a", error_term=error_term))
    worker.forward([("a", 0, 4)], given)
    worker.forward([("a", 4, 8)], given)
    worker.state.pause_request("a")
    worker.state.add_request("b", plan("b"))  # takes its slot
    worker.state.add_request("a", plan("a", error_term=error_term))
    worker.state.add_request("c", plan("c", error_term=error_term))
    parts = [("b", 0, 6), ("a", 0, LENGTH), ("c", cached, LENGTH)]
    _, (_, again), (_, rest) = worker.forward(parts, given)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rest, expected[cached:], rtol=1e-4, atol=1e-4)
    for key, edited, skipped in (("a", LENGTH - 1, 0), ("c", LENGTH - cached, cached)):
        [summary] = worker.state.take_results(key, {0: LENGTH})
        assert summary["edits"][0]["tokens_edited"] == edited
        assert summary["cached"] == skipped


def test_top_k_is_taken_where_it_is_read(tmp_path: Path, kernel: ModuleType | None) -> None:
    sae = Transcoder(tmp_path, WRITES[:1], architecture="topk", k=8)
    worker = TinyWorker([sae], kernel)
    x, y = streams(0, 2)
    f = sae.encode(x)
    latent = int((f[1:] > 0).sum(dim=0).argmax())
    read = PlannedRead(0, 4, EVERYWHERE, 0, 99, None)
    worker.state.add_request("a", plan(edits=(replace(CLAMP, latent=latent),), read=read))
    _, made = run(worker, [x, y])
    expected = y + (5.0 - f[:, latent])[:, None] * sae.weights["W_dec"][latent]
    expected[0] = y[0]
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_the_self_check_holds_the_reconstruction_against_what_stands_where_it_writes(
    tmp_path: Path, kernel: ModuleType | None
) -> None:
    sae = Transcoder(tmp_path, WRITES[:1], architecture="jumprelu")
    worker = TinyWorker([sae], kernel)
    x, _ = streams(0, 2)
    error = 0.1 * torch.randn(LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1))
    y = sae.decode(sae.encode(x), x) + error
    read = PlannedRead(0, 1, COVERS_PROMPT, 0, 99, None, fit=True)
    worker.state.add_request("a", plan(edits=(), report=False, read=read))
    made_x, made_y = run(worker, [x, y])
    assert torch.equal(made_x, x) and torch.equal(made_y, y)
    [summary] = worker.state.take_results("k", {0: LENGTH})
    counted = slice(1, PROMPT)
    spread = (y[counted] - y[counted].mean(dim=0)).square().sum()
    expected = 1 - float(error[counted].square().sum() / spread)
    assert summary["measured"]["tokens"] == PROMPT - 1
    assert summary["measured"]["variance_explained"] == pytest.approx(expected, abs=1e-4)
