"""Mixed traffic for as long as asked, by a server that must stay as it was.

    python -m tests.engine.soak_run --minutes 30 [--json FILE]

A server on a tiny model answers steered, reading and plain requests whose answers were taken alone
before, while other clients leave at random bytes, send what is refused, look up features and
inspect texts. Once a minute everything stops, and what the idle server holds is printed: slots,
rows and requests in the engine, memory and descriptors of each process. Exits 1 where an answer
was another one, where a slot or row stayed, or where memory or descriptors grew during the second
half by more than `MAX_GROWTH` or `MAX_MORE_FILES`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from tests.engine import processes, traffic
from tests.engine.server import LiveServer, start, wait_until_ready
from tests.engine.traffic import Case

FLAGS: Final = (
    *("--max-model-len", "256", "--max-num-seqs", "32", "--steering-max-rows", "64"),
    *("--max-num-queued-reqs", "200", "--no-steering-self-check"),
    "--disable-uvicorn-access-log",
)
BYSTANDERS_AT_ONCE: Final = 24
LEAVERS_AT_ONCE: Final = 8
#: Seconds of traffic between two looks at the idle server.
ROUND_SECONDS: Final = 50.0
#: Of resident memory, in the second half, when caches and pools have filled.
MAX_GROWTH: Final = 0.02
MAX_MORE_FILES: Final = 8


@dataclass
class Tally:
    """What was sent and how it was answered."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    left: int = 0
    refused: int = 0
    looked_up: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Look:
    """An idle server: `resident` bytes and open `files` by process."""

    minute: float
    usage: dict[str, float]
    resident: dict[str, int]
    files: dict[str, int]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--json", type=Path, help="where to write every look at the server")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return _run(Path(folder), asked.minutes, asked.json)


def _run(folder: Path, minutes: float, report: Path | None) -> int:
    model, saes = traffic.make_model(folder), traffic.make_saes(folder)
    server = start(model, saes, folder / "server.log", *FLAGS)
    try:
        wait_until_ready(server)
        cases = traffic.take_alone(server, traffic.make_bodies(11, 90))
        tally, looks = asyncio.run(soak(server, cases, minutes))
        ended = server.process.poll()
        if ended is not None:
            tally.failures.append(f"the server ended with {ended}:\n{server.last_log_lines()}")
    finally:
        server.stop()
    found = [*tally.wrong[:5], *tally.failures[:5], *grown(looks)]
    if report is not None:
        content = {**asdict(tally), "looks": [asdict(look) for look in looks], "found": found}
        report.write_text(json.dumps(content, indent=1) + "\n")
    print(
        f"{tally.right} right answers, {len(tally.wrong)} wrong; {tally.left} clients left, "
        f"{tally.refused} refused as they should be, {tally.looked_up} look-ups, "
        f"{len(tally.failures)} failures"
    )
    print(*found, sep="\n")
    return 1 if found else 0


async def soak(server: LiveServer, cases: list[Case], minutes: float) -> tuple[Tally, list[Look]]:
    """Traffic in rounds, and a look at the idle server after each."""
    tally, rng, looks = Tally(), random.Random(0), list[Look]()
    started = time.monotonic()
    while (now := time.monotonic()) < started + 60 * minutes and server.process.poll() is None:
        until = min(now + ROUND_SECONDS, started + 60 * minutes)
        limits = httpx.Limits(max_connections=None)
        # A client for each round: its connections are closed before the server is looked at.
        async with httpx.AsyncClient(
            base_url=server.base_url, timeout=traffic.ANSWER_TIMEOUT, limits=limits
        ) as client:
            await asyncio.gather(
                *(_ask(client, cases, tally, rng, until) for _ in range(BYSTANDERS_AT_ONCE)),
                *(_leave(server, cases, tally, rng, until) for _ in range(LEAVERS_AT_ONCE)),
                _misuse(client, tally, rng, until),
                _look_up(client, tally, rng, until),
            )
        usage = await asyncio.to_thread(traffic.wait_until_idle, server)
        looks.append(_look(server, (time.monotonic() - started) / 60, usage))
        _print(looks[-1], tally)
    return tally, looks


async def _ask(
    client: httpx.AsyncClient, cases: list[Case], tally: Tally, rng: random.Random, until: float
) -> None:
    while time.monotonic() < until:
        case = rng.choice(cases)
        answer = await traffic.send(client, case.body, stream=rng.random() < 0.5)
        if answer.matches(case):
            tally.right += 1
        else:
            tally.wrong += traffic.wrong([case], [answer])


async def _leave(
    server: LiveServer, cases: list[Case], tally: Tally, rng: random.Random, until: float
) -> None:
    while time.monotonic() < until:
        body = {**rng.choice(cases).body, "stream": rng.random() < 0.7}
        await traffic.leave(server, body, rng.random(), reset=rng.random() < 0.5)
        tally.left += 1


#: Fields that are refused, with the code they are refused with.
_MISUSES: Final[tuple[tuple[Any, str], ...]] = (
    (
        {"interventions": [{"sae": "relu", "feature": 10**6, "op": "ablate"}]},
        "feature_out_of_range",
    ),
    ({"interventions": [{"sae": "none", "feature": 1, "op": "ablate"}]}, "unknown_sae"),
    ({"interventions": [{"feature": 1, "op": "ablate"}]}, "sae_required"),
    ({"interventions": [{"sae": "relu", "feature": True, "op": "ablate"}]}, "invalid_type"),
    ({"interventions": []}, "invalid_value"),
    ({"surprise": 1}, "unknown_field"),
)


async def _misuse(
    client: httpx.AsyncClient, tally: Tally, rng: random.Random, until: float
) -> None:
    while time.monotonic() < until:
        steering, code = rng.choice(_MISUSES)
        body = {**traffic.PLAIN, "prompt": [5, 6, 7], "max_tokens": 2, "steering": steering}
        response = await client.post("/v1/completions", json=body)
        if response.status_code == 400 and response.json()["error"]["code"] == code:
            tally.refused += 1
        else:
            tally.failures.append(f"{steering}: {response.status_code} {response.text[:300]}")
        await asyncio.sleep(0.05)


async def _look_up(
    client: httpx.AsyncClient, tally: Tally, rng: random.Random, until: float
) -> None:
    while time.monotonic() < until:
        sae, feature = rng.choice(("relu", "topk", "later")), rng.randrange(traffic.D_SAE)
        text = " ".join(rng.choices(("the", "quick", "brown", "fox", "features"), k=12))
        for response in (
            await client.get(f"/v1/saes/{sae}/features/{feature}"),
            await client.post(f"/v1/saes/{sae}/inspect", json={"prompt": text}),
        ):
            if response.is_success:
                tally.looked_up += 1
            else:
                tally.failures.append(f"{response.url}: {response.text[:300]}")
        await asyncio.sleep(0.1)


def _look(server: LiveServer, minute: float, usage: dict[str, float]) -> Look:
    found = {_role(p): p for p in processes.of_session(server.process.pid)}
    return Look(
        minute,
        usage,
        {role: process.resident_bytes for role, process in found.items()},
        {role: process.open_files for role, process in found.items()},
    )


def _role(process: processes.Process) -> str:
    named = process.name.split("::")[-1].split(" ")[0] if "VLLM::" in process.name else ""
    if named:
        return named
    return "resources" if "resource_tracker" in process.name else f"server {process.pid}"


def _print(look: Look, tally: Tally) -> None:
    memory = ", ".join(f"{role} {b / 2**20:.0f}" for role, b in look.resident.items())
    files = ", ".join(f"{role} {n}" for role, n in look.files.items())
    print(
        f"minute {look.minute:.1f}: in use {sum(look.usage.values()):.0f}, MiB {memory}; "
        f"files {files}; {tally.right} right, {len(tally.wrong)} wrong, {tally.left} left",
        flush=True,
    )


def grown(looks: list[Look]) -> list[str]:
    """A line for everything that an idle server still held, or held more of in the end."""
    if not looks:
        return ["the server was never looked at"]
    found = [
        f"minute {look.minute:.1f}: {look.usage}" for look in looks if any(look.usage.values())
    ]
    second_half = looks[len(looks) // 2 :]
    first, last = second_half[: len(second_half) // 2], second_half[len(second_half) // 2 :]
    for role in looks[-1].resident if first else ():
        before, after = (
            statistics.mean(look.resident.get(role, 0) for look in part) for part in (first, last)
        )
        if after > before * (1 + MAX_GROWTH):
            found.append(f"{role}: {before / 2**20:.0f} MiB, then {after / 2**20:.0f} MiB")
        files = [max(look.files.get(role, 0) for look in part) for part in (first, last)]
        if files[1] > files[0] + MAX_MORE_FILES:
            found.append(f"{role}: {files[0]} open files, then {files[1]}")
    return found


if __name__ == "__main__":
    sys.exit(main())
