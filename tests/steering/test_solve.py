"""Edits that survive reading again, protected features, limited shares: all read in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from sae.sae import SAE
from sae.solve import IllConditionedError, gain_matrix, is_affine, solve
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    OP_ADD,
    OP_CAP,
    OP_CLAMP,
    OP_FLOOR,
    OP_SCALE,
    PlannedEdit,
    PlannedRead,
    SteeringPlan,
)
from steering.worker.ops import cpu_kernel
from steering.worker.ops.buffers import Kernel
from tests.models import D_MODEL
from tests.steering.tiny_worker import TinyWorker, tied_sae

EVERYWHERE = COVERS_PROMPT | COVERS_GENERATION
LENGTH = 6
OPS = [OP_CLAMP, OP_SCALE, OP_ADD, OP_FLOOR, OP_CAP]


@dataclass
class Weights:
    """An SAE's own file, in float64: what is read again goes by nothing else."""

    sae: SAE
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor

    def preactivations(self, x: Tensor) -> Tensor:
        """``[n, d_sae]`` of ``x`` ``[n, d_in]``."""
        return (x.double() - self.b_dec) @ self.W_enc + self.b_enc

    def activations(self, p: Tensor) -> Tensor:
        return torch.where(p > self.threshold, p, 0.0)


@pytest.fixture(scope="module", params=["standard", "jumprelu"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("sae")
    sae = tied_sae(folder, request.param)
    stored = {n: t.double() for n, t in load_file(folder / "sae_weights.safetensors").items()}
    return Weights(
        sae,
        stored["W_enc"],
        stored["W_dec"],
        stored["b_enc"],
        stored["b_dec"],
        stored.get("threshold", torch.zeros(128, dtype=torch.float64)),
    )


KERNELS: dict[str, Kernel | None] = {"torch": None, "cpu": cpu_kernel}
kernels = pytest.mark.parametrize("kernel", KERNELS)


def steered(weights: Weights, kernel: str, plan: SteeringPlan, x: Tensor) -> Tensor:
    """The stream behind the edits; the first token is not edited."""
    worker = TinyWorker([weights.sae], KERNELS[kernel])
    worker.state.add_request("r", plan)
    [[hidden]] = worker.forward([("r", 0, len(x))], {"r": [x]})
    worker.state.remove_request("r")
    return hidden


def plan_of(edits: list[tuple[int, int, float]], **more: object) -> SteeringPlan:
    planned = tuple(PlannedEdit(0, i, op, v, EVERYWHERE, 0, 99) for i, op, v in edits)
    return replace(SteeringPlan("k", 1, 4, planned, True, False, None), **more)  # type: ignore[arg-type]


def applied(f: Tensor, op: int, value: float) -> Tensor:
    return {
        OP_CLAMP: torch.full_like(f, value),
        OP_SCALE: f * value,
        OP_ADD: f + value,
        OP_FLOOR: f.clamp(min=value),
        OP_CAP: f.clamp(max=value),
    }[op]


edits_of_requests = st.lists(
    st.tuples(
        st.integers(0, 127),
        st.sampled_from(OPS),
        st.sampled_from([0.0, 0.25, -1.0, 2.0, 6.0]),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda edit: edit[0],
)


def solvable(sae: SAE, edits: list[tuple[int, int, float]], protected: list[int]) -> bool:
    try:
        solve(sae, [i for i, _, _ in edits], [(sae, i) for i in protected], reread=True)
    except IllConditionedError:
        return False
    return True


@kernels
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    edits=edits_of_requests,
    protected=st.lists(st.integers(0, 127), max_size=3, unique=True),
)
def test_what_is_read_again_is_what_was_asked_for(
    weights: Weights,
    kernel: str,
    seed: int,
    edits: list[tuple[int, int, float]],
    protected: list[int],
) -> None:
    protected = [i for i in protected if i not in {edit[0] for edit in edits}]
    if not solvable(weights.sae, edits, protected):
        return
    x = torch.randn(LENGTH, D_MODEL, generator=torch.Generator().manual_seed(seed)) * 2
    plan = plan_of(edits, reread=True, protect=tuple((0, i) for i in protected))
    before = weights.preactivations(x)
    if bool(((before - weights.threshold).abs() < 1e-5).any()):
        return  # rounding would decide whether it fires
    after = weights.preactivations(steered(weights, kernel, plan, x))
    f = weights.activations(before)
    for latent, op, value in edits:
        theta = weights.threshold[latent]
        new = applied(f[1:, latent], op, value)
        p = before[1:, latent]
        wanted = torch.where(new > theta, new, torch.minimum(p, 0.9 * theta))
        wanted = torch.where(new == f[1:, latent], p, wanted)
        torch.testing.assert_close(after[1:, latent], wanted, rtol=1e-4, atol=2e-4)
        silent = new <= theta
        if op != OP_SCALE:
            again = weights.activations(after)[1:, latent]
            assert (again[silent & (wanted < theta - 1e-3)] == 0).all()
    torch.testing.assert_close(after[:, protected], before[:, protected], rtol=1e-5, atol=2e-5)


@kernels
@pytest.mark.parametrize("op", OPS)
def test_protected_features_do_not_move_under_plain_edits_either(
    weights: Weights, kernel: str, op: int
) -> None:
    x = torch.randn(LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1)) * 2
    edits = [(5, op, 3.0), (9, op, 8.0)]
    # The same feature twice, nearly: they span one direction, not two.
    protected = [20, 21, 22, 40]
    plain = weights.preactivations(steered(weights, kernel, plan_of(edits), x))
    spared = plan_of(edits, protect=tuple((0, i) for i in protected))
    after = weights.preactivations(steered(weights, kernel, spared, x))
    before = weights.preactivations(x)
    torch.testing.assert_close(after[:, protected], before[:, protected], rtol=1e-5, atol=2e-5)
    assert (plain - before)[:, protected].abs().max() > 1e-2
    assert (after - before)[1:, 5].abs().max() > 1e-1 or op == OP_CAP


def test_a_change_of_nothing_leaves_the_stream_bit_for_bit(weights: Weights) -> None:
    x = torch.randn(LENGTH, D_MODEL, generator=torch.Generator().manual_seed(2)) * 2
    plan = plan_of([(5, OP_SCALE, 1.0), (6, OP_FLOOR, -1.0), (7, OP_CAP, 1e6)], reread=True)
    for kernel in KERNELS:
        assert torch.equal(steered(weights, kernel, plan, x), x)


def test_gains_are_those_of_the_rows(weights: Weights) -> None:
    wanted = weights.W_enc.T[[3, 8]] @ weights.W_dec[[3, 8]].T
    torch.testing.assert_close(gain_matrix(weights.sae, [3, 8]), wanted)


def test_what_protection_left_is_said_of_each_row(weights: Weights) -> None:
    made = solve(weights.sae, [3, 8], [(weights.sae, 20)], reread=False)
    direction = torch.nn.functional.normalize(weights.W_enc.T[20], dim=0)
    for i, latent in enumerate((3, 8)):
        row = weights.W_dec[latent]
        rest = row - (row @ direction) * direction
        torch.testing.assert_close(made.W_dec[i].double(), rest, rtol=1e-5, atol=1e-6)
        gain = float(weights.W_enc.T[latent] @ rest / (weights.W_enc.T[latent] @ row))
        assert made.norm_kept[i] == pytest.approx(float(rest.norm() / row.norm()))
        assert made.gain_kept[i] == pytest.approx(gain)


def test_rows_are_refused_that_hardly_move_or_hardly_part_what_is_read(weights: Weights) -> None:
    # Protecting the feature itself leaves nothing of it that is read.
    with pytest.raises(IllConditionedError, match=r"feature 3 of SAE 'l1'.*needs at least 0\.2"):
        solve(weights.sae, [3], [(weights.sae, 3)], reread=True)
    with pytest.raises(IllConditionedError, match="condition number"):
        solve(weights.sae, [3, 3], reread=True)


def test_only_affine_saes_can_be_solved(weights: Weights) -> None:
    card = weights.sae.card
    assert is_affine(card)
    for name in ("topk", "abstopk", "gated"):
        assert not is_affine(replace(card, architecture=name))
    assert not is_affine(replace(card, normalize_activations="layer_norm"))


# --- shares ---------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("error_term", [True, False], ids=["edits", "reconstruction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_whole_change_is_held_to_its_share_and_summed_up(
    weights: Weights, kernel: str, error_term: bool, dtype: torch.dtype
) -> None:
    x = (torch.randn(LENGTH, D_MODEL, generator=torch.Generator().manual_seed(4)) * 2).to(dtype)
    edits = [(5, OP_CLAMP, 1.0), (9, OP_ADD, 0.5), (12, OP_CLAMP, 4.0)]
    free = plan_of(edits, error_term=error_term)
    read = PlannedRead(0, 1, EVERYWHERE, 0, 99, None)
    changes = (steered(weights, kernel, free, x).float() - x.float())[1:]
    shares = changes.norm(dim=1) / x[1:].float().norm(dim=1)
    most = float(shares.sort().values[2:4].mean())
    for more in ({}, {"read": read}):  # what reads takes the full path
        plan = replace(free, max_share=most, report=True, **more)  # type: ignore[arg-type]
        worker = TinyWorker([weights.sae], KERNELS[kernel])
        worker.state.add_request("r", plan)
        [[hidden]] = worker.forward([("r", 0, LENGTH)], {"r": [x]})
        made = (hidden.float() - x.float())[1:]
        wanted = changes * (most / shares).clamp(max=1)[:, None]
        loose = 5e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(made, wanted, rtol=loose, atol=loose)
        [summary] = worker.state.take_results("k", {0: LENGTH})
        [edited] = summary["edited"]
        assert edited["hook"] == "blocks.1.hook_resid_post"
        assert (edited["tokens"], edited["tokens_limited"]) == (5, int((shares > most).sum()))
        assert edited["max_share"] == pytest.approx(most, rel=1e-2)
        assert edited["mean_share"] == pytest.approx(float(shares.clamp(max=most).mean()), rel=2e-2)
        assert not math.isnan(summary["edits"][0]["mean_activation"])


def test_a_limit_that_is_never_reached_changes_no_bit(weights: Weights) -> None:
    x = torch.randn(LENGTH, D_MODEL, generator=torch.Generator().manual_seed(5)) * 2
    plan = plan_of([(5, OP_CLAMP, 1.0), (9, OP_ADD, 0.5)])
    for kernel in KERNELS:
        free = steered(weights, kernel, plan, x)
        assert torch.equal(steered(weights, kernel, replace(plan, max_share=10.0), x), free)


def test_rows_made_alike_are_shared_and_others_are_not(tmp_path: Path) -> None:
    sae = tied_sae(tmp_path)
    worker = TinyWorker([sae], None)
    pair = plan_of([(5, OP_CLAMP, 1.0), (9, OP_CLAMP, 0.0)])
    solved = replace(pair, reread=True)
    swapped = replace(solved, edits=solved.edits[::-1])
    worker.state.add_request("plain", pair)
    worker.state.add_request("solved", solved)
    assert worker.state.rows.rows_in_use == 4 == len(pair.rows | solved.rows)
    worker.state.add_request("swapped", swapped)
    assert worker.state.rows.rows_in_use == 4
    for req_id in ("plain", "solved", "swapped"):
        worker.state.remove_request(req_id)
    assert worker.state.rows.rows_in_use == 0
