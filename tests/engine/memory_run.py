"""Resident memory of an engine over thousands of requests: plain vLLM, or every request steered.

    python -m tests.engine.memory_run [--steered] [--requests 4000]

The engine, its worker included, lives in this process, so nothing else is in the figure. What grows
alike without an SAE is vLLM's.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import tempfile
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from tests.engine.engine import Engine, tiny_engine
from tests.engine.processes import Process
from tests.models import make_tiny_model

BATCH: Final = 200
LOOK_EVERY: Final = 800


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steered", action="store_true", help="each by one edit, with a report")
    parser.add_argument("--requests", type=int, default=4000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        model = make_tiny_model(Path(folder) / "model", "llama")
        saes: tuple[dict[str, Any], ...] = ({},) if asked.steered else ()
        engine = tiny_engine(model, Path(folder), saes, max_num_seqs=32)
        try:
            watch(engine, asked.requests)
        finally:
            engine.shut_down()


def watch(engine: Engine, requests: int) -> None:
    """Send requests in batches and print the memory every `LOOK_EVERY` of them."""
    rng = random.Random(0)
    for sent in range(BATCH, requests + 1, BATCH):
        prompts = [[1, *rng.choices(range(4, 300), k=rng.randrange(4, 40))] for _ in range(BATCH)]
        edits = [{"feature": rng.randrange(128), "op": "clamp", "value": 2.0} for _ in prompts]
        fields = [{"interventions": [e], "report": True} if engine.saes else None for e in edits]
        engine.generate(prompts, fields, max_tokens=6)
        if sent % LOOK_EVERY == 0:
            gc.collect()
            resident = Process(os.getpid(), "").resident_bytes
            print(f"{sent} requests: {resident / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
