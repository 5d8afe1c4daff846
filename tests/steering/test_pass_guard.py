"""The passes at start are watched: an op that is not called once in each is noticed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sae.card import HookPoint
from steering.vllm import hook_points, installation
from steering.vllm.layer_form import Place
from steering.vllm.pass_guard import PassGuard
from steering.vllm.unsupported import UnsupportedModelError
from steering.worker.ops import registered
from steering.worker.step import Step
from steering.worker.worker_sites import WorkerSites
from steering.worker.worker_state import SteeringState
from tests.steering.layers import WIDTH, Bypassing, Model, Plain

MAX_TOKENS = 16
POINTS = (HookPoint(0, "hook_resid_post"), HookPoint(1, "hook_resid_post"))


def state_of(points: tuple[HookPoint, ...] = POINTS) -> SteeringState:
    """A worker's state without SAEs."""
    buffers = torch.zeros(MAX_TOKENS, dtype=torch.int64), torch.zeros(MAX_TOKENS, dtype=torch.int32)
    sites = WorkerSites(
        [],
        points,
        num_slots=2,
        max_rows=64,
        d_in=WIDTH,
        step=Step(MAX_TOKENS, *buffers, "cpu"),
        special_token_ids=(),
        vocab_size=10,
        device=torch.device("cpu"),
        kernel=None,
        graphs=False,
    )
    state = SteeringState(sites, record=True)
    registered.make_current(state)
    return state


def guarded(model: nn.Module, *, replayed: bool = False) -> PassGuard:
    """A model whose two layers are hooked, watched."""
    for point in POINTS:
        hook_points.install(model, point, 2, 1)
    return PassGuard(state_of(), model, replayed=replayed)


class Loop(Model):
    """Runs its layers twice in a pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(super().forward(hidden_states))


class Skip(Model):
    """Leaves its last layer out where there is but one token."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[0] == 1:
            returned: Tensor = self.layers[0](torch.zeros(1), hidden_states)
            return returned
        return super().forward(hidden_states)


class Channels(Model):
    """Carries a stream of several channels."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.expand(4, *hidden_states.shape).clone())


class Shards(Model):
    """Gives its second layer half of the tokens."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.layers[0](torch.zeros(1), hidden_states)
        returned: Tensor = self.layers[1](torch.zeros(1), hidden_states[::2].clone())
        return returned


def test_an_ordinary_model_passes_and_nothing_is_left_behind() -> None:
    model = Model(Plain(), Plain())
    guard = guarded(model)
    for tokens in (1, MAX_TOKENS):
        model(torch.ones(tokens, WIDTH))
    model(torch.ones(1, 3, WIDTH))
    guard.check()
    assert guard.passes == 3
    guard.leave()
    model(torch.ones(2 * MAX_TOKENS, WIDTH))
    assert guard.passes == 3
    assert not model._forward_hooks
    assert "apply_at" not in vars(guard._state)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Loop, "run 2 times in one pass"),
        (Channels, "the stream there has shape"),
        (Shards, "2 tokens in a pass that has 4 elsewhere"),
    ],
)
def test_a_model_that_goes_its_own_way_is_refused_in_its_first_pass(
    make: type[Model], words: str
) -> None:
    model = make(Plain(), Plain())
    guarded(model)
    with pytest.raises(UnsupportedModelError, match=words):
        model(torch.ones(4, WIDTH))


def test_more_tokens_than_the_engine_has_rows_for_are_refused() -> None:
    model = Model(Plain(), Plain())
    guarded(model)
    with pytest.raises(UnsupportedModelError, match="at most 16 tokens"):
        model(torch.ones(MAX_TOKENS + 1, WIDTH))


def test_a_layer_that_is_left_out_in_one_size_is_refused_in_that_size() -> None:
    model = Skip(Plain(), Plain())
    guarded(model)
    model(torch.ones(4, WIDTH))
    with pytest.raises(UnsupportedModelError, match=r"^blocks\.1\..* without calling"):
        model(torch.ones(1, WIDTH))


def test_a_module_whose_forward_nobody_calls_is_noticed() -> None:
    model = Model(Bypassing(), Bypassing())
    point = HookPoint(1, "mlp.hook_out")
    # As if reading the code had missed that its layer calls another method.
    installation.install(model.layers[1], Place("mlp", output=True), str(point), [], wide=False)
    PassGuard(state_of((point,)), model, replayed=False)
    with pytest.raises(UnsupportedModelError, match="without calling the place"):
        model(torch.ones(4, WIDTH))


def test_a_graph_without_the_op_is_noticed_though_passes_may_be_replayed() -> None:
    model = Model(Plain(), Plain())
    guard = PassGuard(state_of(), model, replayed=True)  # never installed, as in a stale cache
    model(torch.ones(4, WIDTH))
    with pytest.raises(UnsupportedModelError, match="VLLM_DISABLE_COMPILE_CACHE"):
        guard.check()


def test_replayed_passes_may_call_no_op_once_all_were_called() -> None:
    model = Model(Plain(), Plain())
    guard = guarded(model, replayed=True)
    model(torch.ones(4, WIDTH))
    for layer in model.layers:
        layer.__class__ = Plain
    model(torch.ones(4, WIDTH))
    guard.check()
