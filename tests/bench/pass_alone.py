"""Steering's part of one pass with every kind of dictionary, and of a request, without the model.

``python -m tests.bench.pass_alone [out.json]``

The dictionaries of ``dictionaries.py`` and their 20 hook points, 32 requests of 8 clamps each. A
pass calls the op at every hook point as a layer does; before each call as much as a layer's weights
went through the caches. What an unsteered pass takes there, which is the calls themselves, is
subtracted. "Request" is what the worker does for one of them when it enters and when it leaves,
once its rows are in the pool. Times are those of the processor in one thread: what else runs on a
shared machine takes no part in them.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Final

import numpy as np
import torch

from sae.card import HookPoint
from sae.pass_order import place_in_pass
from sae.sae import SAE, open_sae
from sae.source import SAEReference, resolve
from steering.request.limits import POSITION_LIMIT
from steering.request.plan import (
    COVERS_GENERATION,
    COVERS_PROMPT,
    OP_CLAMP,
    PlannedEdit,
    SteeringPlan,
)
from steering.worker.ops import cpu_kernel, registered
from steering.worker.step import Step
from steering.worker.worker_sites import WorkerSites
from steering.worker.worker_state import SteeringState
from tests.bench.cases import REQUESTS, SHAPES, Shape
from tests.bench.demo_engine import D_MODEL, MAX_TOKENS, VOCAB_SIZE
from tests.bench.dictionaries import EDITS, GOALS, sources
from tests.bench.record import Record, arguments, spread
from tests.engine.dictionaries import D_SAE

LAYER_BYTES: Final = 14 * 2**20
PASSES: Final = {"decode": 40, "prefill": 12}
MAX_ROWS: Final = 8192


class Worker:
    """The state of a worker, and the streams that its layers would hand over."""

    def __init__(self, saes: Sequence[SAE]) -> None:
        self._saes = saes
        places = {hook for sae in saes for hook in (sae.card.reads, *sae.card.writes)}
        self.hooks = sorted(places, key=place_in_pass)
        sites = WorkerSites(
            saes,
            [HookPoint.parse(hook) for hook in self.hooks],
            num_slots=REQUESTS,
            max_rows=MAX_ROWS,
            d_in=D_MODEL,
            step=Step(
                MAX_TOKENS,
                torch.full((MAX_TOKENS,), 100),
                torch.full((MAX_TOKENS,), 50, dtype=torch.int32),
                "cpu",
            ),
            special_token_ids=[],
            vocab_size=VOCAB_SIZE,
            device=torch.device("cpu"),
            kernel=cpu_kernel,
            graphs=False,
        )
        self.state = SteeringState(sites, record=True)
        self.state.compile_kernel(torch.float32, [torch.float32])
        self._fresh = torch.randn(MAX_TOKENS, D_MODEL)
        self._hidden, self._residual = torch.empty_like(self._fresh), self._fresh.clone()
        self._weights = torch.zeros(LAYER_BYTES // 4)
        registered.make_current(self.state)

    def plans(self, sae: int) -> list[SteeringPlan]:
        """Of 32 requests with edits of one dictionary."""
        rng = random.Random(0)
        everywhere = COVERS_PROMPT | COVERS_GENERATION
        writes = len(self._saes[sae].card.writes)
        return [
            SteeringPlan(
                key=str(i),
                children=1,
                prompt_len=100,
                edits=tuple(
                    PlannedEdit(
                        sae, latent, OP_CLAMP, 1.0, everywhere, 0, POSITION_LIMIT, writes=writes
                    )
                    for latent in rng.sample(range(D_SAE), EDITS)
                ),
                error_term=True,
                report=False,
                read=None,
            )
            for i in range(REQUESTS)
        ]

    def enter(self, plans: Sequence[SteeringPlan]) -> float:
        """Seconds until requests have entered."""
        started = thread_time()
        for plan in plans:
            self.state.add_request(plan.key, plan)
        return thread_time() - started

    def leave(self) -> float:
        """Seconds until all have left."""
        started = thread_time()
        for i in range(REQUESTS):
            self.state.remove_request(str(i))
        return thread_time() - started

    def passed(self, shape: Shape) -> float:
        """Seconds of one pass."""
        decode = shape.generated > 1
        tokens = 1 if decode else shape.prompt
        starts = np.arange(REQUESTS + 1, dtype=np.int32) * tokens
        if not decode:
            self.state.step.end(wipe=True)  # no chunk of a prompt comes twice
        hidden = self._hidden[: starts[-1]]
        seconds = 0.0
        names = [str(i) for i in range(REQUESTS)]
        self._weights.add_(1)
        started = thread_time()
        self.state.begin_step(names, starts)
        seconds += thread_time() - started
        for hook in self.hooks:
            kind = HookPoint.parse(hook).kind
            residual = self._residual[: starts[-1]] if kind == "hook_resid_post" else None
            self._weights.add_(1)
            hidden.copy_(self._fresh[: starts[-1]])
            started = thread_time()
            registered.steer(hidden, residual, hook)
            seconds += thread_time() - started
        started = thread_time()
        self.state.end_step()
        return seconds + thread_time() - started


def main() -> None:
    """Time every dictionary's passes and write the JSON."""
    args = arguments(__doc__).parse_args()
    record = Record(
        "pass_alone",
        "Steering's part of one pass over 32 requests, 20 hook points, above that of an unsteered "
        "one, and of one request: milliseconds, medians (quartiles).",
        {"requests": REQUESTS, "edits": EDITS, "threads": 1},
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        saes = [open_sae(resolve(SAEReference.parse(source))) for source in sources(Path(folder))]
        worker = Worker(saes)
        for shape in SHAPES:
            idle = median(worker.passed(shape) for _ in range(PASSES[shape.name]))
            record.add(shape=shape.name, case="unsteered, in all", pass_milliseconds=1e3 * idle)
            for index, case in enumerate(GOALS):
                plans = worker.plans(index)
                requests = []
                for _ in range(4):
                    requests.append(worker.enter(plans) + worker.leave())
                worker.enter(plans)
                edited = worker.state.token_counts()[0]
                worker.passed(shape)
                assert worker.state.token_counts()[0] > edited, case
                passes = [worker.passed(shape) - idle for _ in range(PASSES[shape.name])]
                worker.leave()
                record.add(
                    shape=shape.name,
                    case=case,
                    pass_milliseconds=spread([1e3 * one for one in passes]),
                    request_milliseconds=spread([1e3 * one / REQUESTS for one in requests[1:]]),
                )
    record.save(args.json)


if __name__ == "__main__":
    main()
