"""How often a behaviour shows with an edit, and at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any, Final

from tests.bench.steering_answers import Bench, Field, cost
from tests.bench.steering_prompts import Behaviour

#: Edits that answer in one go.
AT_ONCE: Final = 8


def judged(
    bench: Bench,
    behaviour: Behaviour,
    prompts: Sequence[str],
    fields: Sequence[Field | None],
    max_tokens: int,
) -> list[dict[str, Any]]:
    """The figures and answers of each field of steering on these prompts."""
    n = len(prompts)
    unsteered = bench.answers(prompts, [None] * n, max_tokens)
    made: list[dict[str, Any]] = []
    for start in range(0, len(fields), AT_ONCE):
        batch = fields[start : start + AT_ONCE]
        answers = bench.answers(
            [*prompts] * len(batch), [field for field in batch for _ in prompts], max_tokens
        )
        for i in range(len(batch)):
            its = answers[i * n : (i + 1) * n]
            made.append(
                {
                    "unsteered": mean(behaviour.shown_in(answer.text) for answer in unsteered),
                    "shown": mean(behaviour.shown_in(answer.text) for answer in its),
                    "perplexity_ratio": cost(its, unsteered),
                    "repeated": mean(answer.repeated for answer in its),
                    "answers": [answer.text for answer in its],
                }
            )
        print(behaviour.name, len(made), "of", len(fields), flush=True)
    return made
