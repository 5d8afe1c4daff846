"""Fuzz a real server: `python -m tests.engine.fuzz_run --requests 10000`.

A tiny model with three SAEs is served in processes of its own. Hypothesis draws requests from the
grammar of `fuzz_grammar.py` and schemathesis from the server's own /openapi.json; eight clients
send them. Every tenth request is a canary, unsteered or steered in turn, whose tokens must never
change. What counts as wrong stands in `fuzz_verdict.py`; beside it a time-out, another canary, and
slots or rows that are still held at the end.

A status of 500 or above is vLLM's own, and counted apart, if the same request without `steering`
is answered by the same status and message. The exit code is 1 where anything else was wrong.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import httpx

from sae.source import ResolvedSAE
from steering.config import SteeringConfig
from steering.request.catalog import Catalog
from tests.bench.record import Record, arguments
from tests.engine.fuzz_grammar import Grammar, Shot, examples
from tests.engine.fuzz_openapi import openapi_shots, operations
from tests.engine.fuzz_verdict import TIMEOUT, Answer, ask, complaint
from tests.engine.server import MODEL, LiveServer, start, wait_until_ready
from tests.models import D_MODEL, NUM_LAYERS, TRAINING_TEXT, make_tiny_model, make_tiny_sae

#: `later` edits another layer, `twin` the layer of `one`; each architecture has its own arithmetic.
SAES: Final[dict[str, dict[str, Any]]] = {
    "one": {
        "seed": 1,
        "features": [{"index": i, "max_activation": float(i % 7)} for i in range(40)],
    },
    "twin": {"seed": 2, "architecture": "topk"},
    "later": {"seed": 3, "layer": 2, "architecture": "gated"},
}
D_SAE: Final = 128
MAX_MODEL_LEN: Final = 512
#: The second is the canary's own, so that fuzzed requests share its cached blocks.
PROMPTS: Final = ("The quick brown fox", TRAINING_TEXT[:520], "What is the capital?\n")
CLIENTS: Final = 8
CANARY_EVERY: Final = 10

CANARY: Final[dict[str, Any]] = {
    "model": MODEL,
    "prompt": PROMPTS[1],
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "logprobs": 2,
}
CANARY_STEERING: Final = {
    "interventions": [
        {"sae": "one", "feature": 3, "op": "clamp", "value": 6},
        {"sae": "twin", "feature": 9, "op": "add", "value": 2.5},
        {"sae": "later", "feature": 70, "op": "scale", "value": 3},
    ]
}
#: A canary whose two best tokens are closer than this might change by rounding alone.
LEAST_GAP: Final = 1e-3


@dataclass
class Canary:
    """The two requests that are sent throughout, and the tokens they had alone."""

    server: LiveServer
    expected: dict[bool, list[int]] = field(default_factory=dict)

    def sing(self) -> None:
        """Take the tokens while nothing else runs."""
        for steered in (False, True):
            choice = self._ask(steered)
            gaps = [
                best - second
                for best, second in (
                    sorted(top.values(), reverse=True)[:2]
                    for top in choice["logprobs"]["top_logprobs"]
                )
            ]
            assert min(gaps) > LEAST_GAP, f"a canary hangs on rounding: {min(gaps)}"
            self.expected[steered] = choice["token_ids"]
        assert self.expected[True] != self.expected[False]

    def complaint(self, steered: bool) -> str | None:
        """Why the canary is not well; None where it is."""
        found = self._ask(steered)["token_ids"]
        if found == self.expected[steered]:
            return None
        return f"canary (steered: {steered}) {found}, alone {self.expected[steered]}"

    def _ask(self, steered: bool) -> dict[str, Any]:
        body = {**CANARY, **({"steering": CANARY_STEERING} if steered else {})}
        response = self.server.client.post("/v1/completions", json=body, timeout=TIMEOUT)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return dict(choice)


@dataclass
class Tally:
    """What came back."""

    answers: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    complaints: list[dict[str, Any]] = field(default_factory=list)
    own: list[dict[str, Any]] = field(default_factory=list)
    canaries: int = 0
    slowest: tuple[float, str] = (0.0, "")
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, shot: Shot, answer: Answer, seconds: float) -> None:
        with self.lock:
            self.answers[shot.part, answer.status, answer.code or ""] += 1
            what = f"{shot.part}, {shot.path[:60]}, {len(shot.content)} bytes"
            self.slowest = max(self.slowest, (round(seconds, 2), what))

    def complain(self, shot: Shot | None, why: str, answer: str = "") -> None:
        """Keep a failure with what is needed to send it again."""
        sent = (
            {}
            if shot is None
            else {
                "part": shot.part,
                "request": f"{shot.method} {shot.path}"[:300],
                "headers": dict(shot.headers),
                "content": repr(shot.content[:3000]),
                "bytes": len(shot.content),
            }
        )
        with self.lock:
            self.complaints.append({"why": why, **sent, "answer": answer[:2000]})
        print(f"WRONG: {json.dumps(self.complaints[-1])[:3000]}", flush=True)

    def own_failure(self, shot: Shot, answer: Answer) -> None:
        """Keep an answer of vLLM's own that is no steering's doing."""
        kept = {"request": shot.path[:100], "content": repr(shot.content[:1000])}
        with self.lock:
            self.own.append({**kept, "status": answer.status, "answer": answer.text[:500]})

    @property
    def total(self) -> int:
        return self.answers.total()


class Gunner:
    """Sends requests from several threads and judges the answers."""

    def __init__(self, server: LiveServer, catalog: Catalog, canary: Canary, tally: Tally) -> None:
        self._server, self._catalog, self._canary, self._tally = server, catalog, canary, tally
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._free = threading.BoundedSemaphore(2 * CLIENTS)
        self.sent = 0

    def fire(self, shot: Shot) -> None:
        """Send one request soon, and a canary now and then."""
        self._submit(self._send, shot)
        self.sent += 1
        if self.sent % CANARY_EVERY == 0:
            self._submit(self._watch, self.sent % (2 * CANARY_EVERY) == 0)

    def finish(self) -> None:
        """Wait for every answer."""
        self._pool.shutdown()

    def _submit(self, what: Any, argument: Any) -> None:
        self._free.acquire()
        done: Future[None] = self._pool.submit(what, argument)
        done.add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        self._free.release()
        if error := future.exception():
            self._tally.complain(None, f"{type(error).__name__}: {error}"[:1000])

    def _send(self, shot: Shot) -> None:
        before = time.monotonic()
        try:
            answer = ask(self._server.client, shot)
        except httpx.HTTPError as error:
            self._tally.complain(shot, f"no answer: {type(error).__name__} {error}")
            return
        self._tally.count(shot, answer, time.monotonic() - before)
        why = complaint(shot, answer, self._catalog)
        if why is None:
            return
        if answer.status >= 500 and self._is_vllms_own(shot, answer):
            self._tally.own_failure(shot, answer)
        else:
            self._tally.complain(shot, why, answer.text)

    def _is_vllms_own(self, shot: Shot, answer: Answer) -> bool:
        """Whether the same request without steering is answered alike."""
        plain = without_steering(shot)
        if plain is None or shot.path.startswith("/v1/saes"):
            return False
        again = ask(self._server.client, plain)
        return (again.status, again.error.get("message")) == (
            answer.status,
            answer.error.get("message"),
        )

    def _watch(self, steered: bool) -> None:
        self._tally.canaries += 1
        if why := self._canary.complaint(steered):
            self._tally.complain(None, why)


def without_steering(shot: Shot) -> Shot | None:
    """The request of a client that knows nothing of steering; None where it is no object."""
    try:
        body = json.loads(shot.content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict):
        return None
    left = {key: value for key, value in body.items() if key != "steering"}
    return replace(shot, content=json.dumps(left).encode())


def serve(folder: Path) -> tuple[LiveServer, Catalog]:
    """A server on a tiny model, and the same SAEs opened here."""
    model = make_tiny_model(folder / "model")
    saes = {name: make_tiny_sae(folder / name, **how) for name, how in SAES.items()}
    references = tuple(
        ResolvedSAE(name=name, source=str(path), path=str(path)) for name, path in saes.items()
    )
    catalog = Catalog.from_config(SteeringConfig(references, D_MODEL, NUM_LAYERS))
    flags = ("--max-model-len", str(MAX_MODEL_LEN), "--block-size", "32")
    server = start(model, saes, folder / "server.log", *flags)
    wait_until_ready(server)
    return server, catalog


def exceptions(log: str) -> dict[str, int]:
    """The last line of every traceback in a server's log, without values, and how often it came."""
    found: Counter[str] = Counter()
    inside = False
    for line in log.splitlines():
        text = re.sub(r"^\(\w+ pid=\d+\) ?([A-Z]+ [-0-9]+ [:0-9]+ \[[^]]*\] ?)?", "", line)
        if text.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and re.match(r"[\w.]+(:|$)", text):
            found[re.sub(r"[0-9]+", "N", text)[:120]] += 1
            inside = False
    return dict(found)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--openapi", type=float, default=0.3, help="schemathesis' share")
    args = parser.parse_args()
    tally = Tally()
    record = Record(
        "fuzz",
        "Answers of a real server to fuzzed requests, by part, status and code of the refusal.",
        {"requests": args.requests, "seed": args.seed, "clients": CLIENTS, "timeout": TIMEOUT},
    )
    with tempfile.TemporaryDirectory() as folder:
        server, catalog = serve(Path(folder))
        try:
            _fuzz(server, catalog, tally, args.requests, args.openapi, args.seed)
            _end(server, tally)
        finally:
            log = server.log.read_text(errors="replace")
            server.stop()
    for (part, status, code), count in sorted(tally.answers.items()):
        record.add(part=part, status=status, code=code or "-", requests=count)
    record.settings |= {
        "sent": tally.total,
        "canaries": tally.canaries,
        "slowest": tally.slowest,
        "exceptions_in_log": exceptions(log),
        "complaints": tally.complaints,
        "vllms_own_failures": tally.own,
    }
    record.save(args.json)
    print(
        f"fuzz: {tally.total} requests and {tally.canaries} canaries, {len(tally.complaints)} "
        f"wrong, {len(tally.own)} of vLLM's own failures, slowest {tally.slowest}"
    )
    return 1 if tally.complaints else 0


def _fuzz(
    server: LiveServer, catalog: Catalog, tally: Tally, count: int, share: float, first_seed: int
) -> None:
    canary = Canary(server)
    canary.sing()
    gunner = Gunner(server, catalog, canary, tally)
    schema = server.client.get("/openapi.json").json()
    routes = operations(schema)
    for path, method in routes:
        shots = openapi_shots(schema, path, method, MODEL, list(SAES))
        for shot in examples(shots, int(count * share) // len(routes), first_seed):
            gunner.fire(shot)
    # Of some routes the schema says so little that there are few requests.
    grammar = Grammar(MODEL, dict.fromkeys(SAES, D_SAE), PROMPTS)
    for shot in examples(grammar.shots(), count - gunner.sent, first_seed):
        gunner.fire(shot)
    gunner.finish()
    for steered in (False, True):
        if why := canary.complaint(steered):
            tally.complain(None, f"after everything: {why}")


def _end(server: LiveServer, tally: Tally) -> None:
    """The server still runs, and holds nothing of requests that are gone."""
    if server.process.poll() is not None:
        tally.complain(None, "the server has ended")
        return
    deadline = time.monotonic() + TIMEOUT
    held: dict[str, float] = {}
    while time.monotonic() < deadline:
        metrics = server.metrics()
        held = {name: metrics[name] for name in ("steering_slots_in_use", "steering_rows_in_use")}
        if not any(held.values()):
            return
        time.sleep(1)
    tally.complain(None, f"still held: {held}")


if __name__ == "__main__":
    sys.exit(main())
