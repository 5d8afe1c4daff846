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
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
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


@dataclass(eq=False)
class Turn:
    """A turn under way.

    Attributes:
        requests: how many requests it has in the engine.
        tokens: how many tokens these have.
        waited: seconds of it in which the engine had not begun with its request.
    """

    requests: int
    tokens: int
    waited: float = 0.0

    def left_engine(self, waited: float) -> None:
        """The engine no longer has its request, with which it began after so many seconds."""
        self.requests = 0
        self.waited = waited


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
        self._turns: set[Turn] = set()
        self._resume = 0.0

    def request(self, tokens: int) -> AbstractAsyncContextManager[Turn]:
        """A turn for one engine request of a study, of so many tokens."""
        return self._turn(Turn(1, tokens))

    def call(self) -> AbstractAsyncContextManager[Turn]:
        """A turn for a call of the workers that computes, which the engine's steps wait for."""
        return self._turn(Turn(0, 0))

    @asynccontextmanager
    async def _turn(self, turn: Turn) -> AsyncGenerator[Turn, None]:
        async with self._next:
            while not self._may(turn):
                await asyncio.sleep(LOOK_AGAIN)
            self._turns.add(turn)
        began, beside = time.monotonic(), self._served
        try:
            yield turn
        finally:
            self._turns.remove(turn)
            if beside or self._served:
                now = time.monotonic()
                worked = min(max(now - began - turn.waited, 0.0), MOST_COUNTED)
                self._resume = max(self._resume, now + self._rest * worked)

    @property
    def _served(self) -> bool:
        return self._unfinished() > sum(turn.requests for turn in self._turns)

    def _may(self, turn: Turn) -> bool:
        if self._errored():
            return True
        if turn.requests and not self._admits():
            return False
        if self._served:
            return not self._turns and time.monotonic() >= self._resume
        tokens = sum(other.tokens for other in self._turns)
        return not tokens or tokens + turn.tokens <= self._tokens


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
