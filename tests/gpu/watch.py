"""What a worker is asked in these tests beside its work: ``worker_extension_cls`` of the engine."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any, Final

#: Passes since they were last asked for, by the kind of graph that they took.
_taken: Final[Counter[str]] = Counter()


class GraphWatch:
    """Methods for the worker; vLLM makes this a base of its class."""

    use_v2_model_runner: bool
    model_runner: Any
    vllm_config: Any

    def watch_graphs(self) -> dict[str, Any]:
        """RPC: count from now on; what kind of engine this is."""
        compilation = self.vllm_config.compilation_config
        if self.use_v2_model_runner:
            _count_dispatches()
        return {
            "runner": f"{type(self.model_runner).__module__}.{type(self.model_runner).__name__}",
            "device": str(self.model_runner.device),
            "cudagraph_mode": compilation.cudagraph_mode.name,
            "splitting_ops": list(compilation.splitting_ops or ()),
        }

    def graphs_taken(self) -> dict[str, int]:
        """RPC: passes since the last call, by kind of graph; of runner V2 only."""
        found = dict(_taken)
        _taken.clear()
        return found


@functools.cache
def _count_dispatches() -> None:
    from vllm.v1.worker.gpu import model_runner

    dispatch = model_runner.dispatch_cg_and_sync_dp

    @functools.wraps(dispatch)
    def counted(*args: Any, **kwargs: Any) -> Any:
        found = dispatch(*args, **kwargs)
        _taken[found[0].cg_mode.name] += 1
        return found

    model_runner.dispatch_cg_and_sync_dp = counted
