"""Studies read dictionaries of other kinds: directions, and such as write elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.sae import open_sae
from sae.source import ResolvedSAE
from steering.config import SteeringConfig
from steering.request.catalog import Catalog
from steering.request.plan import OP_ADD, PlannedEdit, SteeringPlan
from steering.request.probe import Pool
from steering.request.probe_plan import PlannedPool, PlannedStream, Window
from steering.studies.attribute import _written
from steering.studies.candidates import _norms
from steering.studies.changes import Changes
from steering.studies.reading import Pooled
from steering.worker.ops import cpu_kernel
from tests.models import D_MODEL
from tests.sae.other_suites import LAYERS, decoders, write_circuit_tracer_clt
from tests.sae.suites import D_IN, D_SAE
from tests.steering.split import CLAMP, EVERYWHERE, LENGTH, WRITES, Transcoder, streams
from tests.steering.tiny_worker import TinyWorker

ALL = Window(EVERYWHERE, 0, LENGTH)


def compared(
    worker: TinyWorker, given: list[Tensor], d_sae: int, edit: PlannedEdit
) -> tuple[Changes, list[Tensor]]:
    """What became of the features, and the streams as the edit left them."""
    for key, edits in (("clean", ()), ("steered", (edit,))):
        probes = (PlannedStream(0, (ALL,), key),)
        worker.state.add_request(
            key, SteeringPlan(key, 1, 4, edits, True, False, None, probes=probes)
        )
        [made] = worker.forward([(key, 0, LENGTH)], {key: given})
        worker.state.remove_request(key)
        worker.state.take_results(key, {0: LENGTH})
    [figures] = worker.state.probes.compare("clean", "steered", [0], 0, LENGTH)
    assert figures is not None
    return Changes.none("t", (edit.latent,), d_sae).plus(figures), made


@pytest.mark.parametrize("kind", ["mean", "max", "last"])
def test_directions_are_summed_up_with_their_signs_and_explain_what_they_add(
    tmp_path: Path, kind: str
) -> None:
    rng = torch.Generator().manual_seed(4)
    vectors = torch.randn(3, D_MODEL, generator=rng)
    np.save(tmp_path / "v.npy", vectors.numpy())
    path = str(tmp_path / "v.npy")
    sae = open_sae(ResolvedSAE("t", path, hook="blocks.1.hook_resid_post", path=path))
    worker = TinyWorker([sae], cpu_kernel)
    given = streams(1, 1)
    u = (vectors / vectors.norm(dim=1, keepdim=True)).double()
    f = given[0].double()[1:] @ u.T
    probes = (PlannedPool(0, (ALL,), kind, scaled=False, peaks=False),)
    worker.state.add_request("a", SteeringPlan("k", 1, 4, (), True, False, None, probes=probes))
    for start, stop in ((0, 3), (3, LENGTH)):
        worker.forward([("a", start, stop)], {"a": given})
    [summary] = worker.state.take_results("k", {0: LENGTH})
    found = Pooled.of(summary["probed"][0], Pool("t", (), kind), 3)  # type: ignore[arg-type]
    wanted = {"mean": f.mean(dim=0), "max": f.amax(dim=0), "last": f[-1]}[kind]
    np.testing.assert_allclose(found.dense(found.pooled), wanted.numpy(), 1e-5, 1e-5)
    np.testing.assert_array_equal(found.dense(found.count), (f > 0).sum(dim=0).numpy())
    assert bool((f < 0).any())
    np.testing.assert_allclose(
        found.dense(found.firing), f.clamp(min=0).sum(dim=0).numpy(), 1e-5, 1e-5
    )

    worker.state.remove_request("a")
    edit = PlannedEdit(0, 1, OP_ADD, 2.0, EVERYWHERE, 0, 99)
    changed, _ = compared(worker, given, 3, edit)
    np.testing.assert_allclose(
        (changed.after - changed.before) / (LENGTH - 1), 2 * (u @ u[1]).numpy(), 1e-4, 1e-4
    )
    # Each direction reads its share of what was added, and all of these are taken as explained.
    change = 2 * u[1]
    left = (change - (u @ change) @ u).square().sum() / change.square().sum()
    assert changed.to_json(1, str)["explained"] == pytest.approx(float(1 - left), abs=1e-4)


def test_what_a_transcoders_edits_ask_for_is_of_what_it_reads(tmp_path: Path) -> None:
    sae = Transcoder(tmp_path, WRITES[:1], architecture="topk", k=24)
    worker = TinyWorker([sae], cpu_kernel)
    given = streams(0, 2)
    changed, made = compared(worker, given, sae.card.d_sae, CLAMP)
    assert not torch.equal(made[1], given[1])
    f = sae.encode(given[0][1:]).double()
    assert changed.tokens == LENGTH - 1
    assert changed.asked == pytest.approx(float((5.0 - f[:, 3]).square().sum()), rel=1e-5)
    # What it reads lies before what it writes, and stays.
    np.testing.assert_array_equal(changed.before, changed.after)
    np.testing.assert_allclose(changed.before, f.sum(dim=0).numpy(), 1e-5)
    entry = changed.to_json(4, str)
    assert (entry["leak"], entry["explained"], entry["moved"]) == (0.0, None, [])


def test_features_of_a_clt_are_weighed_by_what_they_write_at_all_places(tmp_path: Path) -> None:
    path = write_circuit_tracer_clt(tmp_path)
    reference = ResolvedSAE("t", str(path), path=str(path), layer=4)
    catalog = Catalog.from_config(SteeringConfig((reference,), D_IN, LAYERS))
    context: Any = SimpleNamespace(catalog=catalog)
    norms = decoders(2, seed=4).double().sum(dim=1).norm(dim=1).numpy()
    np.testing.assert_allclose(_norms(context, "t"), norms, 1e-5)
    features, total = np.array([2, 9], np.int32), np.array([3.0, -0.5])
    none = np.empty(2)
    read = Pooled(D_SAE, 4, features, total, np.array([2, 1], np.int32), none, none)
    found = _written(context, "t", read)
    assert found == pytest.approx({2: 3.0 * norms[2], 9: 0.5 * norms[9]}, rel=1e-5)
