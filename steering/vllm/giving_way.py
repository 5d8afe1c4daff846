"""Studies give way to served requests: beside them they may have a small share of the time.

vLLM batches whatever is there, and a step that computes a study's text takes longer for every
request in it. So while a request is served, one run of a study is in the engine at a time, and
after it all studies rest, for so long that they have had no more than their share. What a run
waited in the engine before its first step is no work and earns no rest: on a busy server studies
would else come to a stop. On an idle server they do not rest. Even then no more tokens of theirs
are in the engine at a time than one step may compute, since that is what a request that comes now
has to wait for.

If the engine limits how many requests it may have, studies leave the last place to served ones, and
wait where they would be refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

#: Share of the time that studies may have beside served requests, unless the server says otherwise.
DEFAULT_SHARE: Final = 0.1
#: Seconds after which a study that waits looks again.
LOOK_AGAIN: Final = 0.01
#: Seconds for which one turn counts at most: a longer one has waited, say for a paused engine.
MOST_COUNTED: Final = 10.0
#: Tokens of studies that are in an engine on a CPU at a time: about a second's work there, and
#: enough to keep its cores at work.
CPU_TOKENS: Final = 512


class Turn:
    """A turn under way.

    Args:
        way: whose turn it is.
        requests: how many engine requests it has.

    Attributes:
        waited: for how many seconds of it the engine did not compute for it.
    """

    def __init__(self, way: GivingWay, requests: int) -> None:
        self._way = way
        self._requests = requests
        self.waited = 0.0

    def left_engine(self, waited: float = 0.0) -> None:
        """The engine no longer has its request, for which it had no time for so many seconds."""
        self._way.forget_requests(self._requests)
        self._requests = 0
        self.waited += waited


class GivingWay:
    """Whose turn it is: the studies' or the served requests'.

    All studies of one server share one of these. They have their turns in the order in which they
    ask.

    Args:
        unfinished: says how many requests the engine has, those of studies included.
        tokens: how many tokens studies may have in the engine at a time; a single run may have
            more.
        share: of the time that studies may have beside served requests, in ``(0, 1]``.
        admits: says whether the engine would take one more request of a study.
        errored: says whether the engine has ended; then nobody waits, so that all learn of it.
    """

    def __init__(
        self,
        unfinished: Callable[[], int],
        tokens: int,
        share: float = DEFAULT_SHARE,
        *,
        admits: Callable[[], bool] = lambda: True,
        errored: Callable[[], bool] = lambda: False,
    ) -> None:
        self._unfinished = unfinished
        self._admits = admits
        self._errored = errored
        self._tokens = tokens
        self._rest = 1 / share - 1  # for each second at work
        self._next = asyncio.Lock()
        self._turns = 0
        self._requests = 0
        self._tokens_in = 0
        self._resume = 0.0

    @asynccontextmanager
    async def request(self, tokens: int) -> AsyncGenerator[Turn, None]:
        """A turn for one engine request of a study, of so many tokens."""
        async with self._turn(1, tokens) as turn:
            yield turn

    @asynccontextmanager
    async def call(self) -> AsyncGenerator[Turn, None]:
        """A turn for a call of the workers that computes, which the engine's steps wait for."""
        async with self._turn(0, 0) as turn:
            yield turn

    def forget_requests(self, requests: int) -> None:
        """So many of the studies' requests have left the engine, before their turns end."""
        self._requests -= requests

    @asynccontextmanager
    async def _turn(self, requests: int, tokens: int) -> AsyncGenerator[Turn, None]:
        async with self._next:
            while not self._may(requests, tokens):
                await asyncio.sleep(LOOK_AGAIN)
            self._turns += 1
            self._requests += requests
            self._tokens_in += tokens
        turn = Turn(self, requests)
        began, beside = time.monotonic(), self._served
        try:
            yield turn
        finally:
            turn.left_engine()
            self._turns -= 1
            self._tokens_in -= tokens
            if beside or self._served:
                now = time.monotonic()
                worked = min(max(now - began - turn.waited, 0.0), MOST_COUNTED)
                self._resume = max(self._resume, now + self._rest * worked)

    @property
    def _served(self) -> bool:
        return self._unfinished() > self._requests

    def _may(self, requests: int, tokens: int) -> bool:
        if self._errored():
            return True
        if requests and not self._admits():
            return False
        if self._served:
            return not self._turns and time.monotonic() >= self._resume
        return not self._tokens_in or self._tokens_in + tokens <= self._tokens


def giving_way(engine: Any, share: float = DEFAULT_SHARE) -> GivingWay:
    """How the studies of a running `AsyncLLM` give way."""
    config = engine.vllm_config
    tokens = config.scheduler_config.max_num_batched_tokens
    if config.device_config.device_type == "cpu":
        tokens = min(tokens, CPU_TOKENS)
    return GivingWay(
        engine.get_num_unfinished_requests,
        tokens * len(engine.engine_core.core_engines),
        share,
        admits=lambda: _admits(engine),
        errored=lambda: bool(engine.errored),
    )


def seconds_queued(output: Any) -> float:
    """For how long a finished `RequestOutput` waited for its first step; 0 if that is not known."""
    stats = output.metrics
    if stats is None or not 0 < stats.queued_ts <= stats.scheduled_ts:
        return 0.0
    waited: float = stats.scheduled_ts - stats.queued_ts
    return waited


def _admits(engine: Any) -> bool:
    """Whether the engine takes a study's request and has room for a served one after it.

    An engine without requests is asked whatever its limits are.
    """
    config = engine.vllm_config.scheduler_config
    unfinished = engine.get_num_unfinished_requests()
    requests, tokens = config.max_num_queued_reqs, config.max_num_queued_tokens
    return not unfinished or (
        (requests is None or unfinished < requests - 1)
        and (tokens is None or engine.get_num_queued_tokens() < tokens)
    )
