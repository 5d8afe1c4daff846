"""Random specs and prompts, and how far an engine is from the reference on them."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.engine import Generated
from tests.engine.reference import ReferenceModel, ReferenceSAE, behind_best, margin

D_SAE = 128
TOLERANCE = 1e-3
#: Specs that come nearer than this to a jump of the SAE are left out.
MARGIN = 1e-4


def positions() -> st.SearchStrategy[dict[str, Any]]:
    """A ``positions`` object that covers something."""
    window = st.one_of(
        st.just({}),
        st.builds(lambda a, n: {"start": a, "end": a + n}, st.integers(0, 20), st.integers(1, 20)),
    )
    phases = st.sampled_from(
        [{}, {"prompt": False}, {"generation": False}, {"special_tokens": True}]
    )
    return st.builds(lambda w, p: {**w, **p}, window, phases)


def interventions(saes: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """One edit of moderate strength."""
    return st.fixed_dictionaries(
        {
            "sae": st.sampled_from(saes),
            "feature": st.integers(0, D_SAE - 1),
            "op": st.sampled_from(["clamp", "ablate", "scale", "add", "floor", "cap"]),
            "value": st.floats(-6, 6, allow_nan=False, width=16),
        },
        optional={"positions": positions()},
    ).map(lambda item: {k: v for k, v in item.items() if k != "value" or item["op"] != "ablate"})


def fields(saes: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """A whole ``steering`` field."""
    return st.fixed_dictionaries(
        {
            "interventions": st.lists(
                interventions(saes),
                min_size=1,
                max_size=6,
                unique_by=lambda item: (item["sae"], item["feature"]),
            )
        },
        optional={"positions": positions(), "error_term": st.booleans()},
    ).filter(_covers_something)


def _covers_something(field: dict[str, Any]) -> bool:
    for item in field["interventions"]:
        where = {**field.get("positions", {}), **item.get("positions", {})}
        if where.get("start", 0) >= where.get("end", 10**9):
            return False
        if not (where.get("prompt", True) or where.get("generation", True)):
            return False
    return True


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """The first ``count`` examples of a strategy, the same in every run."""
    examples: list[Any] = []

    @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate])
    @given(strategy)
    def collect(example: Any) -> None:
        examples.append(example)

    collect()
    assert len(examples) == count
    return examples


def prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of 4 to 30 random tokens after the BOS token, now and then with a special one."""
    rng = random.Random(seed)
    return [
        [
            1,
            *(
                rng.randrange(2 if rng.random() < 0.05 else 4, 300)
                for _ in range(rng.randint(3, 29))
            ),
        ]
        for _ in range(count)
    ]


def difference(
    made: Generated,
    field: dict[str, Any] | None,
    reference: ReferenceModel,
    saes: dict[str, ReferenceSAE],
) -> float | None:
    """Largest difference of log-probabilities; None where the spec comes too near to a jump."""
    seen: dict[str, Tensor] = {}
    expected = reference.logprobs(made.prompt, made.tokens, saes, field, seen)
    if margin(saes, seen, field) < MARGIN:
        return None
    assert behind_best(expected, made.tokens) < TOLERANCE, field
    return max(
        abs(float(expected[i, t]) - logprob)
        for i, (t, logprob) in enumerate(zip(made.tokens, made.logprobs, strict=True))
    )
