"""The self-check through the engine: one read of `sae.self_check.TEXT` for each SAE.

It costs a prefill of some 400 tokens whose stream is encoded and decoded in full. Nothing waits for
it: a server starts it once the engine runs and serves meanwhile, and each SAE waits for a moment in
which nobody is served, within limits. It comes last if the scheduler knows priorities, takes no
rows, shares no cached block, and no `steering_*` series counts it; in vLLM's own series it is one
more request.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator
from typing import Any, Final

from sae.self_check import TEXT, Measured, Outcome, reconstructs, stated_by
from sae.source import ResolvedSAE
from steering.config import SteeringConfig
from steering.request.accepted import Accepted, accept
from steering.request.plan import Inspection
from steering.vllm.door import catalog_for
from steering.vllm.reader import Finished, Reader, Run, Text, run_offline

logger = logging.getLogger("vllm.sae.server")

CACHE_SALT: Final = "vllm-sae self-check"
#: Seconds that an SAE waits for others' requests to end, and seconds between two looks.
PATIENCE: Final = 60.0
LOOK_EVERY: Final = 0.1

# The event loop itself holds tasks weakly.
_running: set[asyncio.Task[None]] = set()


def start(engine: Any, max_bytes: int | None) -> None:
    """Check the SAEs of a running `AsyncLLM` in the background, and log a line for each.

    Of several API servers on one engine only the first does.

    Args:
        engine: the engine client.
        max_bytes: how many bytes of weights may be read in all; None for no limit. A check maps all
            of an SAE's weights into the worker, while opening it costs only its header.
    """
    if engine.vllm_config.parallel_config._api_process_rank > 0:
        return
    task = asyncio.create_task(check_all(engine, max_bytes))
    _running.add(task)
    task.add_done_callback(_running.discard)


async def check_all(engine: Any, max_bytes: int | None = None) -> None:
    """Check one SAE after the other; an outcome with complaints is logged as a warning."""
    from vllm.v1.engine.exceptions import EngineDeadError

    config = SteeringConfig.from_additional_config(engine.vllm_config.additional_config)
    skipped = []
    for reference, small in _with_size(engine, config, max_bytes):
        if not small:
            skipped.append(repr(reference.name))
            continue
        try:
            await _until_idle(engine)
            outcome = await _check(engine, reference)
        except EngineDeadError:
            return  # vLLM says so itself, or is shutting down
        except Exception as error:  # whatever it is, requests are served
            cause = error.__cause__ or error  # vLLM wraps what went wrong in an error without words
            said = " ".join(str(cause).split()) or type(cause).__name__
            logger.warning("SAE %r: the self-check failed: %.500s", reference.name, said)
            continue
        level = logging.WARNING if outcome.complaints else logging.INFO
        logger.log(level, "self-check: %s", outcome.line())
    if skipped and max_bytes is not None:
        logger.info(
            "self-check: left out %s, to read no more than %.0f GB of weights; "
            "--steering-self-check checks them all",
            ", ".join(skipped),
            max_bytes / 1e9,
        )


def check_offline(llm: Any, reference: ResolvedSAE) -> Outcome:
    """Check one SAE of a `vllm.LLM` and return the outcome."""
    config = llm.llm_engine.vllm_config
    run = _run(llm.get_tokenizer(), config, _accepted(config, reference))
    return _outcome(config, reference, run_offline(llm, run))


def _with_size(
    engine: Any, config: SteeringConfig | None, max_bytes: int | None
) -> Iterator[tuple[ResolvedSAE, bool]]:
    """Every SAE to check, and whether it still fits `max_bytes` beside those before it that did."""
    catalog = catalog_for(engine.vllm_config)
    if catalog.limits.holds_none:
        logger.info("self-check: left out, since no SAE is held on the GPU")
        return
    total = 0
    for reference in config.saes if config is not None else ():
        if not reconstructs(catalog.card(reference.name)):
            continue
        size = catalog.sae(reference.name).weight_bytes
        small = max_bytes is None or total + size <= max_bytes
        total += size if small else 0
        yield reference, small


async def _until_idle(engine: Any) -> None:
    """Return once this process has no request in the engine, or patience is at its end."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + PATIENCE
    while engine.output_processor.has_unfinished_requests() and clock() < deadline:
        await asyncio.sleep(LOOK_EVERY)


async def _check(engine: Any, reference: ResolvedSAE) -> Outcome:
    config = engine.vllm_config
    accepted = await asyncio.to_thread(_accepted, config, reference)
    finished = await Reader(engine).run(_run(engine.get_tokenizer(), config, accepted))
    return await asyncio.to_thread(_outcome, config, reference, finished)


def _accepted(vllm_config: Any, reference: ResolvedSAE) -> Accepted:
    field = {"positions": {"generation": False}, "read": {"sae": reference.name, "top_k": 1}}
    return accept(field, catalog_for(vllm_config), Inspection(None, special_tokens=False))


def _run(tokenizer: Any, vllm_config: Any, accepted: Accepted) -> Run:
    """The text, or as much of it as the model takes beside the token that is generated."""
    # Not cut by the tokenizer: its truncation is a state that other threads' requests share.
    ids = tokenizer.encode(TEXT)[: vllm_config.model_config.max_model_len - 1]
    return Run.of(Text(tuple(ids)), accepted, salt=CACHE_SALT)


def _outcome(vllm_config: Any, reference: ResolvedSAE, finished: Finished) -> Outcome:
    card = catalog_for(vllm_config).card(reference.name)
    measured = None if finished.report is None else finished.report.measured
    if measured is not None and measured.median_norm and math.isfinite(measured.median_norm):
        catalog_for(vllm_config).note_stream_norm(reference.name, measured.median_norm)
    return Outcome(
        card=card,
        measured=measured or Measured(0, 0, math.nan, math.nan),
        stated=stated_by(reference, exactly_k=not card.exact_from_row),
        model=vllm_config.model_config.model,
    )
