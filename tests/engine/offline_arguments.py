"""What a tiny `SteeringLLM` is started with."""

from __future__ import annotations

from typing import Any

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 * 2**20,
    "distributed_executor_backend": "uni",
}
