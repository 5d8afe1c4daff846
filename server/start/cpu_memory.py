"""How much of a CPU machine's memory the engine takes if the user does not say.

vLLM's default is 92% of all memory, even if less than that is free; its worker then refuses to
start after a minute of loading.
"""

from __future__ import annotations

import math
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Final

#: The share taken of the memory that is free; the rest is left to everything else on the machine.
SHARE_OF_FREE: Final = 0.75
KV_CACHE_VARIABLE: Final = "VLLM_CPU_KVCACHE_SPACE"


def leave_memory(args: Namespace, parser: Any) -> None:
    """Lower `gpu_memory_utilization` if vLLM's default asks for more than is free, and say so.

    A user's own setting stays: the flag, `--kv-cache-memory-bytes` or `VLLM_CPU_KVCACHE_SPACE`.
    """
    default = parser.get_default("gpu_memory_utilization")
    # A value that was given is another object, even one that equals the default.
    stated = args.gpu_memory_utilization is not default or args.kv_cache_memory_bytes is not None
    if stated or os.environ.get(KV_CACHE_VARIABLE):
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    nodes = [get_memory_node_info(node) for node in get_visible_memory_node()]
    workers = args.tensor_parallel_size * args.pipeline_parallel_size * args.data_parallel_size
    share = share_of_memory(nodes, workers, default)
    if share is None:
        return
    args.gpu_memory_utilization = share
    total, free = (
        sum(getattr(node, kind) for node in nodes) / 2**30
        for kind in ("total_memory", "available_memory")
    )
    print(
        f"vllm-sae: of {total:.1f} GiB of memory {free:.1f} are free; taking "
        f"--gpu-memory-utilization {share} instead of vLLM's {default}. To choose yourself, set "
        f"that flag, or set {KV_CACHE_VARIABLE} to the GiB of KV cache.",
        file=sys.stderr,
        flush=True,
    )


def share_of_memory(nodes: Sequence[Any], workers: int, default: float) -> float | None:
    """The share of its memory node that each worker may take; None if the default fits.

    Args:
        nodes: each with `total_memory` and `available_memory` in bytes.
        workers: how many share the nodes between them.
        default: the share that vLLM would take.
    """
    per_node = math.ceil(workers / len(nodes))
    free: float = min(node.available_memory / node.total_memory for node in nodes)
    if default * per_node <= free:
        return None
    share: float = math.floor(100 * SHARE_OF_FREE * free / per_node) / 100
    return max(0.01, share)
