"""Studies give way to served requests: beside them they may have a small share of the time.

vLLM batches whatever is there, and a step that computes a study's text takes longer for every
request in it. So while a request is served, one run of a study is in the engine at a time, and
after it all studies rest, for so long that they have had no more than their share. On an idle
server they do not rest. Even then no more tokens of theirs are in the engine at a time than one
step may compute, since that is what a request that comes now has to wait for.
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
#: Tokens of studies that are in an engine on a CPU at a time: about a second's work there, and
#: enough to keep its cores at work.
CPU_TOKENS: Final = 512


class GivingWay:
    """Whose turn it is: the studies' or the served requests'.

    All studies of one server share one of these. They have their turns in the order in which they
    ask.

    Args:
        unfinished: says how many requests the engine has, those of studies included.
        tokens: how many tokens studies may have in the engine at a time; a single run may have
            more.
        share: of the time that studies may have beside served requests, in ``(0, 1]``.
    """

    def __init__(
        self, unfinished: Callable[[], int], tokens: int, share: float = DEFAULT_SHARE
    ) -> None:
        self._unfinished = unfinished
        self._tokens = tokens
        self._rest = 1 / share - 1  # for each second at work
        self._next = asyncio.Lock()
        self._turns = 0
        self._requests = 0
        self._tokens_in = 0
        self._resume = 0.0

    @asynccontextmanager
    async def request(self, tokens: int) -> AsyncGenerator[None, None]:
        """A turn for one engine request of a study, of so many tokens."""
        async with self._turn(1, tokens):
            yield

    @asynccontextmanager
    async def call(self) -> AsyncGenerator[None, None]:
        """A turn for a call of the workers that computes, which the engine's steps wait for."""
        async with self._turn(0, 0):
            yield

    @asynccontextmanager
    async def _turn(self, requests: int, tokens: int) -> AsyncGenerator[None, None]:
        async with self._next:
            while not self._may(tokens):
                await asyncio.sleep(LOOK_AGAIN)
            self._enter(1, requests, tokens)
        began, beside = time.monotonic(), self._served
        try:
            yield
        finally:
            self._enter(-1, -requests, -tokens)
            now = time.monotonic()
            if beside or self._served:
                self._resume = max(self._resume, now + self._rest * (now - began))

    @property
    def _served(self) -> bool:
        return self._unfinished() > self._requests

    def _may(self, tokens: int) -> bool:
        if self._served:
            return not self._turns and time.monotonic() >= self._resume
        return not self._tokens_in or self._tokens_in + tokens <= self._tokens

    def _enter(self, turns: int, requests: int, tokens: int) -> None:
        self._turns += turns
        self._requests += requests
        self._tokens_in += tokens


def giving_way(engine: Any, share: float = DEFAULT_SHARE) -> GivingWay:
    """How the studies of a running `AsyncLLM` give way."""
    config = engine.vllm_config
    tokens = config.scheduler_config.max_num_batched_tokens
    if config.device_config.device_type == "cpu":
        tokens = min(tokens, CPU_TOKENS)
    return GivingWay(engine.get_num_unfinished_requests, tokens, share)
