"""The peer's side of ``peers.py``: vllm-lens, which adds vectors to the stream inside vLLM.

Runs in an environment of its own, which has vLLM and vllm-lens and nothing of this project:
``python tests/bench/peer_vllm_lens.py MODEL SAE``. Jobs come and answers go as in
``peer_saelens.py``. vllm-lens has no SAEs, hence no clamps: it is asked to add what an SAE's
``add`` would, the decoder rows of the features times their values, one vector for each
configuration.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from peer_saelens import serve  # type: ignore[import-not-found]  # beside this file: it is run as a script
from safetensors.torch import load_file

LAYER = 14


class Peer:
    """The engine, with the SAE's decoder."""

    def __init__(self, model: str, sae: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            model,
            dtype="float32",
            max_model_len=2304,
            max_num_seqs=32,
            max_num_batched_tokens=2304,
            enable_prefix_caching=False,
            distributed_executor_backend="uni",
            kv_cache_memory_bytes=2 * 2**30,
        )
        self.W_dec = load_file(Path(sae) / "sae_weights.safetensors")["W_dec"].float()

    def vector(self, edits: list[Any]) -> Any:
        """What the edits add, for vllm-lens."""
        from vllm_lens import SteeringVector  # type: ignore[import-not-found]

        rows = self.W_dec[[int(feature) for feature, _ in edits]]
        values = torch.tensor([float(value) for _, value in edits])
        return SteeringVector(
            activations=(values @ rows)[None], layer_indices=[LAYER], scale=1.0, norm_match=False
        )


def answer(peer: Peer, job: dict[str, Any]) -> dict[str, Any]:
    """Do a job."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=job["tokens"],
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args={"apply_steering_vectors": [peer.vector(edits)]} if edits else None,
        )
        for edits in job["edits"]
    ]
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    started = perf_counter()
    outputs = peer.llm.generate(prompts, params, use_tqdm=False)
    seconds = perf_counter() - started
    return {"seconds": seconds, "tokens": [list(o.outputs[0].token_ids) for o in outputs]}


if __name__ == "__main__":
    serve(lambda: Peer(sys.argv[1], sys.argv[2]), answer)
