"""Qwen3-Next, which has gated DeltaNet in attention's place, read as transformers reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from vllm.distributed import cleanup_dist_env_and_memory

from tests.engine.draws import prompts
from tests.engine.engine import SPECIAL_TOKEN_IDS, tiny_engine
from tests.engine.reference import ReferenceModel, ReferenceSAE

#: One with linear attention, and one after it.
LAYERS = (2, 3)
PLACES = {
    "hook_resid_mid": ("post_attention_layernorm", False),
    "hook_mlp_out": ("mlp", True),
}


def test_layers_of_linear_attention_read_the_stream_of_transformers_within_bfloat16(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    # Gated DeltaNet runs in bfloat16 only on a CPU, so that no text can be held against float32;
    # a stream that is read twice, or without a branch, would be off by its whole size.
    folder = tiny_model("qwen3_next")
    kinds = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out")
    features = list(range(8))
    reference = ReferenceModel(folder, SPECIAL_TOKEN_IDS, PLACES)
    saes = [
        {"architecture": "standard", "layer": layer, "hook_kind": kind, "seed": layer}
        for kind in kinds
        for layer in LAYERS
    ]
    # What engines before it have left of process groups has none for experts, which vLLM wants.
    cleanup_dist_env_and_memory()
    engine = tiny_engine(folder, tmp_path, saes, dtype="bfloat16", max_num_seqs=6)
    try:
        own = {name: ReferenceSAE(path) for name, path in engine.saes.items()}
        spec = {
            "interventions": [
                {"sae": name, "feature": feature, "op": "cap", "value": 1e5}
                for name in own
                for feature in features
            ],
            "report": True,
        }
        for made in engine.generate(prompts(3, seed=2), [spec] * 3):
            seen: dict[str, Tensor] = {}
            reference.logprobs(made.prompt, made.tokens, own, spec, seen)
            ids = [*made.prompt, *made.tokens][:-1]
            covered = [t for t, i in enumerate(ids) if t and i not in SPECIAL_TOKEN_IDS]
            for name, sae in own.items():
                expected = sae.encode(seen[name])[covered][:, features].mean(0)
                found = torch.tensor(
                    [
                        entry["mean_activation"]
                        for entry in made.steering[0].interventions
                        if entry["sae"] == name
                    ]
                )
                assert (found - expected).norm() < 0.1 * expected.norm(), (name, found, expected)
    finally:
        engine.shut_down()
        cleanup_dist_env_and_memory()
