"""The full pass in vLLM's profile run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.card import HookPoint
from sae.sae import SAE, open_sae
from sae.source import ResolvedSAE
from steering.vllm.rehearsal import rehearse_full_passes
from steering.worker import batch_parts
from steering.worker.step import Step
from steering.worker.worker_sites import WorkerSites
from steering.worker.worker_state import SteeringState
from tests.models import D_MODEL, make_tiny_sae

NUM_TOKENS = 12
HOST = torch.device("cpu")


@pytest.fixture
def state(tmp_path: Path) -> SteeringState:
    """Steering of two TopK SAEs and two others at two hook points."""
    kinds: tuple[dict[str, Any], ...] = (
        {"d_sae": 64, "layer": 1},
        {"d_sae": 96, "layer": 2},
        {"d_sae": 128, "layer": 2, "architecture": "topk"},
        {"d_sae": 32, "layer": 1, "architecture": "topk"},
    )
    paths = [make_tiny_sae(tmp_path / str(i), **kind) for i, kind in enumerate(kinds)]
    saes = [open_sae(ResolvedSAE(str(i), str(p), path=str(p))) for i, p in enumerate(paths)]
    zeros = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    sites = WorkerSites(
        saes,
        [HookPoint(1, "hook_resid_post"), HookPoint(2, "hook_resid_post")],
        num_slots=2,
        max_rows=64,
        d_in=D_MODEL,
        step=Step(NUM_TOKENS, zeros, zeros.int(), HOST),
        special_token_ids=(),
        vocab_size=10,
        device=HOST,
        kernel=None,
        graphs=False,
    )
    return SteeringState(sites, record=True)


def test_the_profile_run_makes_a_part_of_a_full_pass_with_the_largest_sae_of_each_kind(
    state: SteeringState, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eight tokens of 64 latents in a part, five of 96 and four of 128.
    at_once = batch_parts._ENCODES_AT_ONCE
    monkeypatch.setattr(batch_parts, "_WORKSPACE_ELEMENTS", at_once * 64 * 8 + 127)
    encoded: list[tuple[str, tuple[int, ...]]] = []
    decoded: list[str] = []
    encode, decode = SAE.encode, SAE.decode

    def _encode(self: SAE, x: Tensor) -> Tensor:
        encoded.append((self.card.id, tuple(x.shape)))
        return encode(self, x)

    def _decode(self: SAE, f: Tensor, x: Tensor) -> Tensor:
        decoded.append(self.card.id)
        return decode(self, f, x)

    monkeypatch.setattr(SAE, "encode", _encode)
    monkeypatch.setattr(SAE, "decode", _decode)
    hidden_states = torch.randn(NUM_TOKENS, D_MODEL, dtype=torch.float64).bfloat16()
    before = hidden_states.clone()

    def profile_run(**kwargs: Any) -> str:
        assert kwargs == {"randomize_inputs": True}
        for hook in state.hooks:
            state.apply_at(hook, hidden_states, None)
            state.apply_at(hook, hidden_states[None], hidden_states[None])
        return "profiled"

    runner = SimpleNamespace(profile_run=profile_run)
    rehearse_full_passes(runner, state)
    assert runner.profile_run(randomize_inputs=True) == "profiled"
    assert encoded == [("1", (5, D_MODEL)), ("2", (4, D_MODEL))] * 2
    assert decoded == ["1", "2"] * 2
    assert torch.equal(hidden_states, before)

    encoded.clear()
    state.apply_at("blocks.2.hook_resid_post", hidden_states, None)
    assert not encoded
    assert not state.slots.in_use and not state.records.clients
