"""What a steered request costs before and after its tokens: admission, and entering the batch.

``python -m tests.bench.admission [out.json] [--full]``

"admit" is the front end's part, once a request: validation, the salt, the plan. "enter" is the
worker's, once a request: a slot, its table of edits, and the rows of its features, which are
fetched from the memory map ("new rows") or found in the pool ("rows in the pool"). "leave" gives
slot and rows back. The demo SAE; times are those of the processor in one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import thread_time
from types import SimpleNamespace
from typing import Final

import torch

from sae.card import HookPoint
from sae.sae import open_sae
from sae.source import ResolvedSAE
from steering.config import SteeringConfig
from steering.request.catalog import Catalog
from steering.vllm.door import complete, plan_of
from steering.worker.step import Step
from steering.worker.worker_sites import WorkerSites
from steering.worker.worker_state import SteeringState
from tests.bench.cases import SAE_NAME, steering
from tests.bench.demo_engine import D_MODEL, NUM_LAYERS, SAE, SPECIAL_TOKENS, VOCAB_SIZE
from tests.bench.record import Record, arguments, spread

PROMPT_LEN: Final = 16
SLOTS: Final = 32
MAX_ROWS: Final = 4096
CONFIGURATIONS: Final = 64  # distinct ones, so that 64 edits of each just fit the pool


def clock(function: Callable[[], object]) -> float:
    """Milliseconds of the processor in one call."""
    started = thread_time()
    function()
    return 1e3 * (thread_time() - started)


def worker_state(reference: ResolvedSAE) -> SteeringState:
    """A worker's steering, without a worker."""
    sae = open_sae(reference)
    sites = WorkerSites(
        [sae],
        [HookPoint.parse(sae.card.hook)],
        num_slots=SLOTS,
        max_rows=MAX_ROWS,
        d_in=D_MODEL,
        step=Step(SLOTS, torch.zeros(SLOTS, dtype=torch.int64),
                  torch.zeros(SLOTS, dtype=torch.int32), "cpu"),
        special_token_ids=range(SPECIAL_TOKENS),
        vocab_size=VOCAB_SIZE,
        device=torch.device("cpu"),
        kernel=None,
        graphs=False,
    )  # fmt: skip
    return SteeringState(sites, record=True)


def request(i: int, field: dict[str, object]) -> SimpleNamespace:
    """What admission looks at of an engine's request."""
    return SimpleNamespace(
        request_id=str(i),
        sampling_params=SimpleNamespace(extra_args={"steering": field}, n=1),
        prompt_token_ids=[0] * PROMPT_LEN,
        prompt_embeds=None,
        resumable=False,
        cache_salt=None,
    )


def measure(edits: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each part for every request of every round; each round has a pool anew."""
    reference = ResolvedSAE(SAE_NAME, str(SAE), path=str(SAE))
    config = SteeringConfig((reference,), D_MODEL, NUM_LAYERS, tuple(range(SPECIAL_TOKENS)))
    catalog = Catalog.from_config(config)
    found: dict[str, list[float]] = {
        part: [] for part in ("admit", "enter_new_rows", "enter_rows_in_the_pool", "leave")
    }
    complete(request(0, steering(1, edits)[0]), catalog)  # the weights' checksum, once
    for _ in range(rounds):
        state = worker_state(reference)
        for again in (False, True):
            for i, field in enumerate(steering(CONFIGURATIONS, edits)):
                asked = request(i, field)
                found["admit"].append(clock(partial(complete, asked, catalog)))
                plan = plan_of(asked.sampling_params)
                assert plan is not None
                part = "enter_rows_in_the_pool" if again else "enter_new_rows"
                found[part].append(clock(partial(state.add_request, str(i), plan)))
                found["leave"].append(clock(partial(state.remove_request, str(i))))
    return found


def main() -> None:
    """Measure 1, 8 and 64 edits and write the JSON."""
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    rounds = 4 if args.full else 1
    record = Record(
        "admission",
        "Milliseconds of one request, beside its tokens: medians (quartiles).",
        {"rounds": rounds, "configurations": CONFIGURATIONS, "threads": 1},
    )
    for edits in (1, 8, 64):
        columns = {
            f"{part}_milliseconds": spread(times) for part, times in measure(edits, rounds).items()
        }
        record.add(edits=edits, **columns)
    record.save(args.json)


if __name__ == "__main__":
    main()
