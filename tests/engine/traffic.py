"""Many requests at once to a server on a tiny model, each with an answer taken alone beforehand.

In another batch the same sums may round otherwise. A request whose greedy choice is anywhere nearer
than `MARGIN` to the second is therefore not used, and edits are made in a ReLU SAE: one with a
jump would turn a rounding difference into a whole activation.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from tests.engine.server import MODEL, LiveServer
from tests.models import EOS_ID, PAD_ID, VOCAB_SIZE, make_tiny_model, make_tiny_sae

#: The least difference of log-probabilities between the best two tokens; rounding makes 1e-5.
MARGIN: Final = 1e-3
D_SAE: Final = 512
OPS: Final = ("clamp", "ablate", "scale", "add", "floor", "cap")
#: Seconds that one request may take among hundreds of others on a busy machine.
ANSWER_TIMEOUT: Final = 240.0
#: Seconds within which what ended or was dropped must have left the engine.
DRAIN_TIMEOUT: Final = 60.0

Body = dict[str, Any]
#: A greedy completion that never ends early, with its tokens' ids.
PLAIN: Final[Body] = {
    "model": MODEL,
    "temperature": 0,
    "ignore_eos": True,
    "logit_bias": {str(EOS_ID): -100},
    "return_token_ids": True,
}


@dataclass(frozen=True)
class Case:
    """A completion request, and what it answers when nothing else runs.

    `edited` is the report's `tokens_edited` of each edit, None for a request without a report.
    """

    body: Body
    tokens: list[int]
    edited: list[int] | None

    @property
    def steered(self) -> bool:
        return "steering" in self.body


@dataclass(frozen=True)
class Answer:
    """What came back: a status, and for a success the tokens and the report's counts."""

    status: int
    tokens: list[int]
    edited: list[int] | None
    error: str = ""

    def matches(self, case: Case) -> bool:
        """Whether it is the answer taken alone; with a prefix cached, fewer tokens are edited."""
        right = self.status == httpx.codes.OK and self.tokens == case.tokens
        return right and (self.edited is None) == (case.edited is None)


def make_model(folder: Path) -> Path:
    return make_tiny_model(folder / "model")


def make_saes(folder: Path) -> dict[str, Path]:
    """`relu` to edit through and `topk` to read, both at layer 1, and `later` at layer 3."""
    return {
        "relu": make_tiny_sae(folder / "relu", d_sae=D_SAE, architecture="standard", seed=1),
        "topk": make_tiny_sae(folder / "topk", d_sae=D_SAE, architecture="topk", seed=2),
        "later": make_tiny_sae(
            folder / "later", d_sae=D_SAE, architecture="standard", seed=3, layer=3
        ),
    }


def make_bodies(seed: int, count: int, *, reads: bool = True) -> list[Body]:
    """Random requests, every third without steering, some with a report, a few that read."""
    rng = random.Random(seed)
    return [_body(rng, steered=i % 3 != 0, read=reads and i % 8 == 1) for i in range(count)]


def _body(rng: random.Random, *, steered: bool, read: bool) -> Body:
    prompt = [rng.randrange(PAD_ID + 1, VOCAB_SIZE) for _ in range(rng.randint(4, 60))]
    body = {**PLAIN, "prompt": prompt, "max_tokens": rng.randint(8, 32)}
    if steered:
        body["steering"] = {
            "interventions": [
                edit(rng.choice(("relu", "later")), feature, rng)
                for feature in rng.sample(range(D_SAE), rng.randint(1, 6))
            ],
            "report": rng.random() < 0.3,
            **({"read": {"sae": "topk", "top_k": 2}} if read else {}),
        }
    return body


def edit(sae: str, feature: int, rng: random.Random) -> Body:
    """One edit of moderate size; half of them leave the prompt or what follows it alone."""
    op = rng.choice(OPS)
    value = {} if op == "ablate" else {"value": round(rng.uniform(0.2, 3.0), 2)}
    phase = rng.choice(({}, {}, {"prompt": False}, {"generation": False}))
    return {"sae": sae, "feature": feature, "op": op, **value, "positions": phase}


def take_alone(server: LiveServer, bodies: Sequence[Body]) -> list[Case]:
    """Ask for each alone; those whose greedy choice is too near a tie are left out."""
    cases = []
    for body in bodies:
        response = server.client.post("/v1/completions", json={**body, "logprobs": 2})
        assert response.status_code == httpx.codes.OK, response.text
        content = response.json()
        (choice,) = content["choices"]
        ordered = (sorted(top.values()) for top in choice["logprobs"]["top_logprobs"])
        if all(best - second > MARGIN for second, best in (values[-2:] for values in ordered)):
            cases.append(Case(body, choice["token_ids"], _edited(content)))
    assert len(cases) > len(bodies) // 2, "a model of too many ties"
    return cases


async def send_all(server: LiveServer, cases: Sequence[Case], at_once: int) -> list[Answer]:
    """Send all, streamed or not by turns, `at_once` of them at any time; answers in order."""
    places = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.base_url, timeout=ANSWER_TIMEOUT, limits=limits
    ) as client:

        async def one(i: int, case: Case) -> Answer:
            async with places:
                return await send(client, case.body, stream=i % 2 == 0)

        return await asyncio.gather(*(one(i, case) for i, case in enumerate(cases)))


async def send(client: httpx.AsyncClient, body: Body, *, stream: bool) -> Answer:
    """One request, its answer put together from a stream's chunks if it is streamed."""
    sent = {**body, "stream": True} if stream else body
    try:
        response = await client.post("/v1/completions", json=sent)
    except httpx.TransportError as error:
        return Answer(0, [], None, repr(error))
    if response.status_code != httpx.codes.OK:
        return Answer(response.status_code, [], None, response.text)
    if not stream:
        content = response.json()
        return Answer(response.status_code, content["choices"][0]["token_ids"], _edited(content))
    tokens: list[int] = []
    edited = None
    ended = False
    for line in response.text.splitlines():
        data = line.removeprefix("data: ")
        ended = ended or data == "[DONE]"
        if data.startswith("{"):
            chunk = json.loads(data)
            if "error" in chunk:
                return Answer(chunk["error"].get("code") or 0, [], None, data)
            for choice in chunk["choices"]:
                tokens += choice["token_ids"]
            edited = _edited(chunk) or edited
    return Answer(response.status_code if ended else 0, tokens, edited, "" if ended else "cut off")


def _edited(content: Mapping[str, Any]) -> list[int] | None:
    entries = content.get("steering", {}).get("interventions")
    return None if entries is None else [entry["tokens_edited"] for entry in entries]


def wrong(cases: Sequence[Case], answers: Sequence[Answer]) -> list[str]:
    """A line for each answer that is not the one taken alone."""
    return [
        f"request {i}: {answer.status} {answer.error[:200]} {answer.tokens} for {case.tokens}, "
        f"edited {answer.edited} for {case.edited}: {json.dumps(case.body)}"
        for i, (case, answer) in enumerate(zip(cases, answers, strict=True))
        if not answer.matches(case)
    ]


# Clients that leave


async def storm(
    server: LiveServer, cases: Sequence[Case], count: int, at_once: int, rng: random.Random
) -> int:
    """`count` requests whose clients leave at a random byte of the request or of the response.

    Returns:
        How many of them had read a part of the response by then.
    """
    places = asyncio.Semaphore(at_once)
    plans = [
        ({**rng.choice(cases).body, "stream": rng.random() < 0.7}, rng.random(), rng.random() < 0.5)
        for _ in range(count)
    ]

    async def one(body: Body, where: float, reset: bool) -> bool:
        async with places:
            return await leave(server, body, where, reset=reset)

    return sum(await asyncio.gather(*(one(*plan) for plan in plans)))


#: About what a streamed response of these requests has.
_RESPONSE_BYTES: Final = 6000


async def leave(server: LiveServer, body: Body, where: float, *, reset: bool) -> bool:
    """Leave at a share `where` of request and response; whether any of the response was read.

    Args:
        reset: end the connection by a reset instead of an orderly close.
    """
    address = urlsplit(server.base_url)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    request = head.encode() + content
    cut = int(where * (len(request) + _RESPONSE_BYTES))
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    started = False
    try:
        writer.write(request[:cut])
        await writer.drain()
        left = cut - len(request)
        while left > 0 and (part := await asyncio.wait_for(reader.read(left), ANSWER_TIMEOUT)):
            started, left = True, left - len(part)
            # A response that is not streamed is shorter than that, and then the server waits.
            left = 0 if not body["stream"] else left
    finally:
        if reset:
            _reset_on_close(writer)
        writer.close()
    return started


def _reset_on_close(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# The engine afterwards

_IDLE: Final = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting"),
    *("steering_slots_in_use", "steering_rows_in_use", "steering_results_held"),
)


def usage(server: LiveServer) -> dict[str, float]:
    """Requests in the engine, slots and rows in use, results held, as /metrics says."""
    found = dict.fromkeys(_IDLE, 0.0)
    for line in server.client.get("/metrics").text.splitlines():
        name = line.split("{")[0].split(" ")[0]
        if name in found:
            found[name] += float(line.rsplit(" ", 1)[1])
    return found


def wait_until_idle(server: LiveServer) -> dict[str, float]:
    """What is still in use once nothing moves any more: all 0, unless something leaks."""
    deadline = time.monotonic() + DRAIN_TIMEOUT
    while any((left := usage(server)).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
