"""Studies whose client leaves at any moment: nothing of theirs stays in engine or workers."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from sae.source import ResolvedSAE
from steering.config import SteeringConfig
from steering.request.accepted import accept
from steering.studies.comparison import Comparison, Side
from steering.studies.scoring import Scorer
from steering.vllm.door import catalog_for
from steering.vllm.engine_arguments import engine_arguments
from steering.vllm.plugin import register
from steering.vllm.reader import Reader
from steering.vllm.results import worker_stats
from tests.engine.engine import SPECIAL_TOKEN_IDS
from tests.engine.outputs import tokens
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_sae

FIELD: Final = {"interventions": [{"feature": 3, "op": "clamp", "value": 6}], "report": True}
TEXTS: Final = [(tuple(tokens(i, 30 + i)), tuple(tokens(50 + i, 12)[1:])) for i in range(12)]
LEAVERS: Final = 16
#: Seconds in which all must be gone; never waited for in full.
PATIENCE: Final = 60


def async_engine(model: Path, folder: Path) -> Any:
    """An `AsyncLLM`, its engine core in a process of its own."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    register()
    path = str(make_tiny_sae(folder / "sae", architecture="standard"))
    config = SteeringConfig(
        (ResolvedSAE("a", path, path=path),), D_MODEL, NUM_LAYERS, SPECIAL_TOKEN_IDS
    )
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=8,
            # Texts come in chunks, so that there is more than one moment within each.
            max_num_batched_tokens=32,
            kv_cache_memory_bytes=64 * 2**20,
            **engine_arguments(config),
        )
    )


@pytest.mark.timeout(400)
def test_client_that_leaves_at_any_moment_leaves_nothing(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    asyncio.run(_leave_again_and_again(tiny_model("llama"), tmp_path))
    gc.collect()  # an engine that is collected with the interpreter complains


async def _leave_again_and_again(model: Path, folder: Path) -> None:
    engine = async_engine(model, folder)
    try:
        catalog = catalog_for(engine.vllm_config)
        accepted = accept(FIELD, catalog)
        reader = Reader(engine)
        comparisons = [
            Comparison(Side(*text), [(Side(*text, accepted), ()), (Side(*text), ())])
            for text in TEXTS
        ]
        steered = [Comparison(Side(*text), [(Side(*text, accepted, ("a",)), ())]) for text in TEXTS]

        async def compared() -> list[float]:
            found = {}
            async with aclosing(Scorer(reader).compare_all(comparisons)) as figures:
                async for place, side, one in figures:
                    found[place, side] = float(one.kl.mean())
            return [found[key] for key in sorted(found)]

        async def read() -> int:
            async with aclosing(Scorer(reader, catalog).compare_all(steered)) as found:
                return len([one async for one in found])

        alone = await compared()
        started = time.monotonic()
        again = await compared()
        took = time.monotonic() - started
        assert again == pytest.approx(alone, abs=1e-6)
        assert max(alone) > 1e-3 and min(alone) < 1e-9
        rng = random.Random(0)
        for i in range(LEAVERS):
            study = asyncio.create_task(compared() if i % 2 else read())
            await asyncio.sleep(rng.uniform(0, took))
            study.cancel()
            await asyncio.gather(study, return_exceptions=True)
        # Beside others that leave, one that stays has the same figures.
        leaver = asyncio.create_task(read())
        stayed = asyncio.create_task(compared())
        await asyncio.sleep(took / 4)
        leaver.cancel()
        np.testing.assert_allclose(await stayed, alone, atol=1e-6)
        await asyncio.wait_for(_gone(engine), PATIENCE)
    finally:
        engine.shutdown()


async def _gone(engine: Any) -> None:
    """Return once workers hold nothing: a request's end comes to them with the next pass."""
    while True:
        async for _ in engine.generate(
            {"prompt_token_ids": [1, 5]}, _one_token(), f"{time.time()}"
        ):
            pass
        stats = await worker_stats(engine)
        if (stats.results_held, stats.slots_in_use) == (0, 0):
            return
        await asyncio.sleep(0.05)


def _one_token() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1)
