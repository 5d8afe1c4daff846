"""Prompts and edits that the engine's tests share, and what they compare."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine.engine import SPECIAL_TOKEN_IDS, Engine, Generated

STRONG = {"interventions": [{"feature": 7, "op": "clamp", "value": 8.0}]}
OTHER = {"interventions": [{"feature": 9, "op": "add", "value": 6.0}]}
PROMPT_ONLY = {**STRONG, "positions": {"generation": False}}
GENERATION_ONLY = {**STRONG, "positions": {"prompt": False}}


def tokens(seed: int, length: int) -> list[int]:
    """A prompt of ``length`` ordinary tokens after the BOS token."""
    rng = random.Random(seed)
    return [1, *(rng.randrange(4, 300) for _ in range(length - 1))]


#: Nats. On CUDA vLLM's attention multiplies float32 in TF32, which rounds to 11 bits.
ROUNDING = 2e-2 if torch.cuda.is_available() else 2e-4


def same(left: Generated, right: Generated) -> bool:
    """Equal tokens, and log-probabilities equal up to the rounding of another batch's shape."""
    return left.tokens == right.tokens and left.logprobs == pytest.approx(
        right.logprobs, abs=ROUNDING
    )


def edited(made: Generated, edit: int = 0) -> int:
    """The reported count of edited tokens."""
    count: int = made.steering[0].interventions[edit]["tokens_edited"]
    return count


def ordinary(ids: list[int]) -> int:
    """Tokens that are not special."""
    return sum(token not in SPECIAL_TOKEN_IDS for token in ids)


def generated(made: Generated) -> int:
    """Generated tokens that entered the model and are not special."""
    return ordinary(made.tokens[:-1])


def reporting(field: dict[str, Any]) -> dict[str, Any]:
    return {**field, "report": True}


def count_preemptions(engine: Engine) -> Callable[[], int]:
    """Counts what the engine's own scheduler preempts from now on."""
    seen: list[str] = []
    preempt = engine.scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(request.request_id)
        return preempt(request, *args, **kwargs)

    engine.scheduler._preempt_request = counted
    return lambda: len(seen)
