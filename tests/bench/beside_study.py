"""How long served requests take beside a running study, against without one.

``python -m tests.bench.beside_study [out.json] [--full] [--rounds N]``

``vllm-sae serve`` in processes of its own, the demo model and SAE. Some clients ask for one short
completion after another; the figure is the median latency of a request. Beside it, evaluations
follow one another, of texts of several hundred tokens; how many of their tokens a second enter the
model, beside the traffic and on an idle server, says what is left for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import httpx

from tests.bench.alternate import Run, alternate
from tests.bench.cases import SAE_NAME
from tests.bench.demo_engine import SAE, prompts
from tests.bench.over_http import serve
from tests.bench.record import Record, Rounds, arguments, spread
from tests.engine.server import MODEL, LiveServer, wait_until_ready

CLIENTS: Final = 4
#: Requests of one client, one after another.
EACH: Final = 12
PROMPT: Final = 64
GENERATED: Final = 32
TEXTS: Final = 8
TEXT: Final = 384
SCORED: Final = 128
CONFIGURATIONS: Final = 4
CONTROL: Final = "no study (control)"
BESIDE: Final = "beside a study"
IDLE_SECONDS: Final = 30
TIMEOUT: Final = httpx.Timeout(300)

ROUNDS: Final = Rounds(short=3, full=8)


@dataclass
class Studied:
    """What studies did while they ran.

    Attributes:
        tokens: of their texts that entered the model.
        seconds: over which they did.
    """

    tokens: float = 0.0
    seconds: float = 0.0


def evaluation(seed: int) -> dict[str, Any]:
    """A study of random texts, different for each seed."""
    texts = prompts(TEXTS, TEXT, seed)
    return {
        "texts": [
            {"prompt": text[: TEXT - SCORED], "completion": text[TEXT - SCORED :]} for text in texts
        ],
        "configurations": [
            {
                "name": str(i),
                "steering": {"interventions": [{"feature": 1234 + i, "op": "clamp", "value": 2.0}]},
            }
            for i in range(CONFIGURATIONS)
        ],
    }


async def study(client: httpx.AsyncClient) -> None:
    """Run one study after another until cancelled."""
    for seed in count():
        response = await client.post("/v1/steering/evaluate", json=evaluation(seed))
        response.raise_for_status()


@asynccontextmanager
async def studying(
    server: LiveServer, client: httpx.AsyncClient, studied: Studied, others: int
) -> AsyncIterator[None]:
    """Studies run inside, beside others' prompts of so many tokens in all."""
    task = asyncio.create_task(study(client))
    try:
        await asyncio.sleep(1)
        before, started = prompt_tokens(server), time.perf_counter()
        yield
        studied.tokens += prompt_tokens(server) - before - others
        studied.seconds += time.perf_counter() - started
        if task.done():
            task.result()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def prompt_tokens(server: LiveServer) -> float:
    """Tokens of prompts that vLLM has counted since the server started."""
    lines = server.client.get("/metrics").text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm:prompt_tokens_total")
    )


async def latencies(client: httpx.AsyncClient) -> list[float]:
    """Seconds of each served request."""
    found: list[float] = []

    async def one_client(asked: list[list[int]]) -> None:
        for prompt in asked:
            started = time.perf_counter()
            body = {
                "model": MODEL,
                "prompt": prompt,
                "max_tokens": GENERATED,
                "temperature": 0,
                "ignore_eos": True,
            }
            response = await client.post("/v1/completions", json=body)
            response.raise_for_status()
            found.append(time.perf_counter() - started)

    asked = prompts(CLIENTS * EACH, PROMPT)
    await asyncio.gather(*(one_client(asked[i::CLIENTS]) for i in range(CLIENTS)))
    return found


async def served(server: LiveServer, studied: Studied | None) -> Run:
    """The median latency and, as `ttft`, its ninth decile, with studies beside or without."""
    async with httpx.AsyncClient(base_url=server.base_url, timeout=TIMEOUT) as client:
        if studied is None:
            found = await latencies(client)
        else:
            async with studying(server, client, studied, CLIENTS * EACH * PROMPT):
                found = await latencies(client)
    run = Run(median(found), quantiles(found, n=10)[-1])
    print("without" if studied is None else BESIDE, run.seconds, run.ttft, flush=True)
    return run


async def idle(server: LiveServer, seconds: float) -> Studied:
    """Studies on a server that serves nothing else."""
    studied = Studied()
    async with (
        httpx.AsyncClient(base_url=server.base_url, timeout=TIMEOUT) as client,
        studying(server, client, studied, 0),
    ):
        await asyncio.sleep(seconds)
    return studied


def main() -> None:
    """Start the server, compare and write the JSON."""
    parser = arguments(__doc__)
    args, rounds = ROUNDS.parse(parser)
    record = Record(
        "beside_study",
        f"Latency of {CLIENTS} clients' completions beside a running study: medians (quartiles).",
        {
            "rounds": rounds, "clients": CLIENTS, "requests": CLIENTS * EACH, "prompt": PROMPT,
            "generated": GENERATED, "study": f"{TEXTS} texts of {TEXT} tokens, {SCORED} scored, "
            f"{CONFIGURATIONS} configurations",
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        server = serve({SAE_NAME: SAE}, Path(folder) / "server.log")
        try:
            wait_until_ready(server)
            studied = Studied()
            found = alternate(
                lambda: asyncio.run(served(server, None)),
                {
                    CONTROL: lambda: asyncio.run(served(server, None)),
                    BESIDE: lambda: asyncio.run(served(server, studied)),
                },
                rounds,
            )
            alone = asyncio.run(idle(server, IDLE_SECONDS))
        finally:
            server.stop()
    for case, compared in found.items():
        record.add(
            case=case,
            p50_ratio=spread([1 / one.throughput_ratio for one in compared]),
            p90_ratio=spread([one.ttft_ratio for one in compared]),
        )
    record.add(
        case="tokens of studies a second",
        beside_traffic=studied.tokens / studied.seconds,
        on_an_idle_server=alone.tokens / alone.seconds,
    )
    ratio = spread([1 / one.throughput_ratio for one in found[BESIDE]])
    record.target("p50 latency beside a study / without", ratio, 1.1, at_most=True)
    record.save(args.json)


if __name__ == "__main__":
    main()
