"""What a worker is asked in these tests beside its work: ``worker_extension_cls`` of the engine."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

ROWS, WHOLE = "rows", "whole"
#: Passes since they were last asked for, by what they needed and the kind of graph that they took.
_taken: Final[dict[str, Counter[str]]] = {ROWS: Counter(), WHOLE: Counter()}


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
        device = self.model_runner.device
        steering = getattr(self, "steering", None)
        saes = [] if steering is None else [*steering.probes._residency.saes.values()]
        return {
            "held": [sae.card.id for sae in saes if sae._weights._resident],
            "exact_from_row": {sae.card.id: sae.card.exact_from_row for sae in saes},
            "runner": f"{type(self.model_runner).__module__}.{type(self.model_runner).__name__}",
            "device": str(device),
            "cudagraph_mode": compilation.cudagraph_mode.name,
            "splitting_ops": list(compilation.splitting_ops or ()),
        }

    def graphs_taken(self) -> dict[str, dict[str, int]]:
        """RPC: passes since the last call that needed a whole encode and others, by kind of graph.

        Of runner V2 only. Requests do not all arrive before the first pass, so that a wave with a
        request that reads has passes of both sorts.
        """
        found = {need: dict(taken) for need, taken in _taken.items()}
        for taken in _taken.values():
            taken.clear()
        return found


@functools.cache
def _count_dispatches() -> None:
    from vllm.v1.worker.gpu import model_runner

    model_runner.dispatch_cg_and_sync_dp = counting(model_runner.dispatch_cg_and_sync_dp)


def counting(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """``dispatch``, noted in `GraphWatch.graphs_taken`."""
    from steering.vllm import runner_v2

    @functools.wraps(dispatch)
    def counted(*args: Any, **kwargs: Any) -> Any:
        found = dispatch(*args, **kwargs)
        need = WHOLE if runner_v2._full_pass.needed() else ROWS
        _taken[need][found[0].cg_mode.name] += 1
        return found

    return counted
