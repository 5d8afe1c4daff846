"""Requests that need full passes, in which some SAE is encoded whole or a stream is kept.

All pipeline stages must choose the same kind of pass, so each stage also counts requests that need
one only on another stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sae.arrays import IntArray


@dataclass
class FullRequest:
    """A request in the batch that needs full passes.

    Attributes:
        prompt_len: tokens of its original prompt.
        until: from this position on none of its tokens needs a full pass.
        next_position: no later pass computes a position before this one.
    """

    prompt_len: int
    until: int
    next_position: int = 0

    def advance(self, num_tokens: int) -> None:
        """A pass over this many of its tokens has ended.

        All of the prompt's tokens are kept. After the prompt a pass may be speculative, and only
        one of its tokens is sure to be kept.
        """
        reached = self.next_position + num_tokens
        self.next_position = (
            reached if reached <= self.prompt_len else max(self.prompt_len, self.next_position + 1)
        )


class FullRequests:
    """The requests of the batch that need full passes, each until none of its tokens does."""

    def __init__(self) -> None:
        self._running: dict[str, FullRequest] = {}
        # Which of them are in the pass under way, and with how many tokens.
        self._in_pass: list[tuple[str, int]] = []

    def add(self, req_id: str, prompt_len: int, until: int) -> None:
        """A request enters the batch, to be computed from its first position; see `FullRequest`."""
        self._running[req_id] = FullRequest(prompt_len, until)

    def remove(self, req_id: str) -> None:
        """A request leaves the batch, whether or not it is one of these."""
        self._running.pop(req_id, None)

    def any(self, req_ids: Iterable[str]) -> bool:
        """Whether a pass over these requests is a full one."""
        return bool(self._running) and any(req_id in self._running for req_id in req_ids)

    def begin(self, req_ids: Sequence[str], query_start_loc: IntArray) -> None:
        """A forward pass begins; arguments as those of `SteeringState.begin_step`."""
        self._in_pass = []
        if self._running:
            starts = query_start_loc.tolist()
            lengths = zip(req_ids, starts, starts[1:], strict=False)
            self._in_pass = [
                (req_id, stop - start) for req_id, start, stop in lengths if req_id in self._running
            ]

    def end(self) -> list[str]:
        """The forward pass is over.

        Returns:
            The ids of the requests that need no further full pass.
        """
        done = []
        for req_id, num_tokens in self._in_pass:
            request = self._running.get(req_id)
            if request is None:
                continue
            request.advance(num_tokens)
            if request.next_position >= request.until:
                del self._running[req_id]
                done.append(req_id)
        self._in_pass = []
        return done
