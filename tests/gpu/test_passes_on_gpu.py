"""A worker's passes on a CUDA device against the same passes in torch on the CPU.

What the kernel's own tests leave out: whole encodes, weights that take turns on the device, results
on their way to the host, and what makes the host wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.sae import SAE, open_sae
from sae.source import ResolvedSAE
from steering.config import RESIDENT_ALL, RESIDENT_NONE, RESIDENT_TURNS
from steering.report import features_read
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    GATE_ABOVE,
    OP_ADD,
    OP_CLAMP,
    SCOPE_TOKEN,
    PlannedEdit,
    PlannedGate,
    PlannedRead,
    SteeringPlan,
)
from steering.worker.ops import triton_kernel
from steering.worker.probes import strongest_in_one
from tests.gpu.device import DEVICE, REHEARSAL, nothing_may_wait, sizes
from tests.models import D_MODEL, make_tiny_sae
from tests.steering.split import WRITES, Transcoder
from tests.steering.tiny_worker import TinyWorker, tied_sae

pytestmark = pytest.mark.gpu

EVERYWHERE: Final = COVERS_PROMPT | COVERS_GENERATION
PROMPT, LENGTH = 6, 10
CLAMP: Final = PlannedEdit(0, 3, OP_CLAMP, 5.0, EVERYWHERE, 0, 99)
READ: Final = PlannedRead(1, 4, EVERYWHERE, 0, 99, None)

#: Requests by what they ask of a JumpReLU SAE (0) and a TopK one (1).
ROWS: Final[dict[str, dict[str, Any]]] = {
    "clamp": {},
    "two edits": {"edits": (CLAMP, replace(CLAMP, latent=9, op=OP_ADD, value=2.0))},
    "condition": {
        "edits": (replace(CLAMP, gates=1),),
        "gates": (PlannedGate(0, 5, GATE_ABOVE, 0.0, SCOPE_TOKEN),),
    },
    "limit": {"max_share": 0.1},
}
WHOLE: Final[dict[str, dict[str, Any]]] = {
    "TopK": {"edits": (replace(CLAMP, sae=1), CLAMP)},
    "features": {"edits": (), "read": READ},
    "read beside an edit": {"read": replace(READ, sae=0)},
    "totals": {"edits": (), "read": replace(READ, aggregate="mean")},
    "reconstruction": {"error_term": False},
}


@pytest.fixture
def saes(tmp_path: Path) -> list[SAE]:
    return both_saes(tmp_path)


def both_saes(folder: Path) -> list[SAE]:
    path = make_tiny_sae(folder / "topk", architecture="topk", layer=2, seed=5, k=32)
    topk = open_sae(ResolvedSAE("topk", str(path), path=str(path)))
    return [tied_sae(folder / "jumprelu", layer=1), topk]


def plan(key: str, **more: Any) -> SteeringPlan:
    return replace(SteeringPlan(key, 1, PROMPT, (CLAMP,), True, True, None), **more)


def streams(seed: int, hooks: int = 2) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(LENGTH, D_MODEL, generator=rng) * 2 for _ in range(hooks)]


def run(
    worker: TinyWorker, asked: Mapping[str, dict[str, Any]], hooks: int = 2
) -> tuple[list[list[list[Tensor]]], dict[str, Any]]:
    """Prompts in two chunks, then tokens one at a time, beside a request that asks for nothing.

    Returns:
        what each pass made of its streams, and what was recorded of each request.
    """
    names = [*asked, "plain"]
    given = {name: streams(i, hooks) for i, name in enumerate(names)}
    for name, more in asked.items():
        worker.state.add_request(name, plan(name, **more))
    chunks = [(0, 4), (4, PROMPT), *((t, t + 1) for t in range(PROMPT, LENGTH))]
    made = [worker.forward([(name, *chunk) for name in names], given) for chunk in chunks]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    recorded = {name: worker.state.take_results(name, {0: LENGTH})[0] for name in asked}
    for chunk, of_pass in zip(chunks, made, strict=True):
        for stream, clean in zip(given["plain"], of_pass[-1], strict=True):
            assert torch.equal(clean, stream[slice(*chunk)])
    return made, recorded


def _features(read: Any) -> dict[int, dict[int, float]]:
    """By position and latent: equal activations may stand in either order."""
    return {
        position: {int(latent): value for latent, value in features}
        for position, features in features_read(read)
    }


def assert_same(left: Any, right: Any) -> None:
    """Equal but for the rounding of numbers."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            if key == "read" and left[key] is not None:
                assert_same(_features(left[key]), _features(right[key]))
            else:
                assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)
    else:
        assert left == right


def compare(
    on_device: Sequence[SAE],
    on_host: Sequence[SAE],
    asked: Mapping[str, dict[str, Any]],
    hooks: int = 2,
    **options: Any,
) -> None:
    slots = len(asked) + 1
    worker = TinyWorker(on_device, triton_kernel, slots=slots, device=DEVICE, **options)
    made, recorded = run(worker, asked, hooks)
    expected, wanted = run(TinyWorker(on_host, None, slots=slots), asked, hooks)
    for of_pass, as_wanted in zip(made, expected, strict=True):
        for stream, right in zip(of_pass, as_wanted, strict=True):
            for here, there in zip(stream, right, strict=True):
                torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    assert_same(recorded, wanted)


@pytest.mark.parametrize("resident", [RESIDENT_TURNS, RESIDENT_ALL, RESIDENT_NONE])
def test_whole_encodes_on_the_device_agree_with_those_on_the_host(
    tmp_path: Path, resident: str
) -> None:
    compare(both_saes(tmp_path / "device"), both_saes(tmp_path / "host"), WHOLE, resident=resident)


def test_rows_and_whole_encodes_of_one_batch_agree_with_the_host(tmp_path: Path) -> None:
    asked = {**ROWS, **{name: WHOLE[name] for name in ("TopK", "features")}}
    compare(both_saes(tmp_path / "device"), both_saes(tmp_path / "host"), asked)


@pytest.mark.parametrize("writes", sizes(WRITES, WRITES[:1]), ids=len)
def test_what_reads_and_writes_at_different_places_agrees_with_the_host(
    tmp_path: Path, writes: tuple[str, ...]
) -> None:
    edits = (replace(CLAMP, writes=len(writes)),)
    asked: dict[str, dict[str, Any]] = {
        "halves": {"edits": edits},
        "limited": {"edits": edits, "max_share": 0.3},
        "read too": {"edits": edits, "read": replace(READ, sae=0)},
    }
    if len(writes) == 1:
        asked["reconstruction"] = {"edits": edits, "error_term": False}
    device, host = (
        [Transcoder(tmp_path / name, writes, architecture="jumprelu")] for name in ("d", "h")
    )
    compare(device, host, asked, hooks=1 + len(writes))


def test_a_pass_of_rows_never_waits_for_the_device(saes: list[SAE]) -> None:
    worker = TinyWorker(saes, triton_kernel, slots=len(ROWS), device=DEVICE)
    for name, more in ROWS.items():
        worker.state.add_request(name, plan(name, **more))
    hidden = torch.randn(len(ROWS), D_MODEL, device=DEVICE)
    worker.positions[: len(ROWS)] = PROMPT

    def one_pass(names: Sequence[str]) -> None:
        worker.state.begin_step(names, np.arange(len(names) + 1))
        for hook in worker.hooks:
            worker.state.apply_at(hook, hidden, None)
        worker.state.end_step()

    one_pass([*ROWS])  # compiles
    with nothing_may_wait():
        one_pass([*ROWS])
        one_pass([*reversed(ROWS)])  # a batch that has to be laid out
    assert worker.state.token_counts()[0] > 0


@pytest.mark.parametrize("asked", WHOLE)
def test_a_pass_with_a_whole_encode_waits_once_for_as_long_as_its_batch_stays(
    saes: list[SAE], monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    if REHEARSAL:  # a CPU has a ranking of its own, which looks at values
        monkeypatch.setattr("steering.worker.full_path.strongest", strongest_in_one)
    worker = TinyWorker(saes, triton_kernel, device=DEVICE, resident=RESIDENT_TURNS)
    worker.state.add_request("a", plan("a", **WHOLE[asked]))
    hidden = torch.randn(4, D_MODEL, device=DEVICE)
    worker.positions[:4] = torch.arange(4, device=DEVICE)

    def one_pass() -> None:
        worker.state.begin_step(["a"], np.array([0, 4]))
        for hook in worker.hooks:
            worker.state.apply_at(hook, hidden, None)
        worker.state.end_step()

    one_pass()  # lays the batch out, which stays as it is, and brings the weights
    with nothing_may_wait():
        one_pass()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    [summary] = worker.state.take_results("a", {0: 4})
    if asked == "features":
        assert [position for position, _ in features_read(summary["read"])] == [1, 2, 3]
