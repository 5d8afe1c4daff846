"""The engine under measurement: the demo model with the demo SAE, in this process.

``vllm.LLM`` rather than a server: the same scheduler, runner and worker, without HTTP and
tokenization around them, so what steering adds is a larger share and easier to see.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

# Read by vLLM when it is imported: engine core and worker in this process, where a benchmark can
# look at them.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# The graphs compiled are the same; vLLM 0.32 cannot load those that it kept, and this way a start
# takes half a minute instead of one and a quarter.
os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")

from safetensors.torch import load_file, save_file

from server.commands.demo_model import ensure_demo_model
from tests.bench.alternate import Run
from tests.bench.cases import REQUESTS, Field
from tests.engine.engine import Engine, start

D_MODEL: Final = 576
NUM_LAYERS: Final = 30
VOCAB_SIZE: Final = 49152
MAX_TOKENS: Final = 2304  # of a request, and of a step
SPECIAL_TOKENS: Final = 17  # the first ids of the vocabulary
SAE: Final = Path(__file__).parents[2] / "sae" / "demo" / "smollm2-135m-l14"


def settings(*, eager: bool = False) -> dict[str, Any]:
    """vLLM's arguments for the demo model in float32, as ``vllm-sae demo`` serves it.

    The prefix cache is off: repeated prompts would be found in it and nothing would be measured.
    """
    return {
        "dtype": "float32",
        "enforce_eager": eager,
        "max_model_len": MAX_TOKENS,
        "max_num_seqs": REQUESTS,
        "max_num_batched_tokens": MAX_TOKENS,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "distributed_executor_backend": "uni",
        "kv_cache_memory_bytes": 2 * 2**30,
    }


def demo_engine(saes: Mapping[str, Path], *, eager: bool = False, **arguments: Any) -> Engine:
    """An engine with these `settings`; without SAEs plain vLLM."""
    return start(
        ensure_demo_model(),
        saes,
        d_model=D_MODEL,
        num_layers=NUM_LAYERS,
        special_token_ids=range(SPECIAL_TOKENS),
        **{**settings(eager=eager), **arguments},
    )


def name_of_result(experiment: str, sae: Path) -> str:
    """The name of what an experiment finds on an SAE; the demo's own goes without saying."""
    return experiment if sae.resolve() == SAE.resolve() else f"{experiment}-{sae.name}"


def topk_sae(folder: Path, k: int = 32) -> Path:
    """The demo SAE as the TopK one that it was trained as: the same rows, k of them a token."""
    card = json.loads((SAE / "cfg.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({**card, "architecture": "topk", "k": k}))
    weights = load_file(SAE / "sae_weights.safetensors")
    del weights["threshold"]
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def prompts(n: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """``n`` prompts of random ordinary tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(SPECIAL_TOKENS, VOCAB_SIZE) for _ in range(tokens)] for _ in range(n)]


def run(
    engine: Engine,
    batch: Sequence[list[int]],
    fields: Sequence[Field],
    tokens: int,
    clock: Callable[[], float] = perf_counter,
) -> Run:
    """Generate exactly ``tokens`` tokens for every prompt of the batch at once, greedily."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if field is None else {"steering": dict(field)},
        )
        for field in fields
    ]
    requests: Any = [{"prompt_token_ids": prompt} for prompt in batch]
    started = clock()
    outputs = engine.llm.generate(requests, params, use_tqdm=False)
    seconds = clock() - started
    stats = [output.metrics for output in outputs]
    itl = [(s.last_token_ts - s.first_token_ts) / max(tokens - 1, 1) for s in stats]
    return Run(seconds, median(s.first_token_latency for s in stats), median(itl))


def edited_tokens(engine: Engine) -> int:
    """Tokens that the engine has edited since it started."""
    edited: int = engine.state.token_counts()[0]
    return edited
