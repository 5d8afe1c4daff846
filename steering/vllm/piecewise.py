"""Piecewise CUDA graphs that leave the op out, so that a full pass can still use them.

vLLM cuts a compiled model at ``splitting_ops``, captures the pieces, and runs those ops between the
pieces as they are. If ``vllm_sae::steer`` is among them, a pass in pieces may do at a hook point
what no graph can hold: allocate memory, and decide on the host.
"""

from __future__ import annotations

from typing import Any, Final

from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config.compilation import CompilationMode, CUDAGraphMode

from steering.worker.ops.registered import NAMESPACE

STEER: Final = f"{NAMESPACE}::steer"


def split_at_steer(compilation_config: Any) -> None:
    """Put the op among ``splitting_ops`` if vLLM captures pieces, before anything is compiled.

    Inductor's own partition and breakable graphs are left alone: they cut elsewhere.

    Args:
        compilation_config: vLLM's ``CompilationConfig``, changed in place.
    """
    if (
        compilation_config.mode == CompilationMode.VLLM_COMPILE
        and compilation_config.cudagraph_mode.has_piecewise_cudagraphs()
        and not compilation_config.use_inductor_graph_partition
        and not is_breakable_cudagraph_enabled()
        and compilation_config.splitting_ops_contain_attention()
        and STEER not in compilation_config.splitting_ops
    ):
        compilation_config.splitting_ops.append(STEER)


def runs_between_pieces(manager: Any) -> bool:
    """Whether batches of any shape run in pieces with the op between them, if not in full graphs.

    Args:
        manager: runner V2's ``CudaGraphManager``, None in its profile run.
    """
    return (
        manager is not None
        and manager.cudagraph_mode.mixed_mode() == CUDAGraphMode.PIECEWISE
        and STEER in (manager.compilation_config.splitting_ops or ())
    )
