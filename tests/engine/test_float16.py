"""Streams that an edit makes too large for their dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from tests.engine.engine import Engine
from tests.engine.outputs import STRONG, same, tokens
from tests.models import VOCAB_SIZE

MOST = 1e6
#: Each is beyond what float16 holds, or makes the next layer's infinite.
TOO_LARGE = (
    {"interventions": [{"feature": 3, "op": "clamp", "value": MOST}], "report": True},
    {"interventions": [{"feature": 3, "op": "add", "value": -MOST}], "error_term": False},
    {"interventions": [{"feature": 3, "op": "add", "value": MOST}], "read": {}},
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_edit_too_large_for_the_stream_is_answered_and_spares_its_neighbours(
    make_engine: Callable[..., Engine], dtype: str
) -> None:
    prompts = [tokens(800 + i, 12 + 3 * i) for i in range(len(TOO_LARGE) + 2)]
    engine = make_engine(dtype=dtype)
    neighbours = (None, STRONG)
    alone = [
        engine.generate([prompt], [steering])[0]
        for prompt, steering in zip(prompts[-2:], neighbours, strict=True)
    ]
    made = engine.generate(prompts, [*TOO_LARGE, *neighbours], seed=1)
    for generated in made[:-2]:
        assert len(generated.tokens) == 8
        # Logits of nothing but NaN would be taken for an even distribution.
        assert generated.logprobs != pytest.approx([-math.log(VOCAB_SIZE)] * 8, abs=1e-4)
        assert all(map(math.isfinite, generated.logprobs))
        if generated.steering is not None:
            json.dumps([vars(choice) for choice in generated.steering], allow_nan=False)
    for beside, expected in zip(made[-2:], alone, strict=True):
        assert same(beside, expected)
