"""vLLM with steering against transformers with hooks, on random specs over real architectures."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.engine import SPECIAL_TOKEN_IDS, Engine, Generated, tiny_engine
from tests.engine.reference import ReferenceModel, ReferenceSAE, behind_best, margin

D_SAE = 128
TOLERANCE = 1e-3
#: Specs that come nearer than this to a jump of the SAE are left out.
MARGIN = 1e-4
SPECS_A_CASE = 130
LEAST_SPECS = 100

# Family, the SAEs it is served with, and more arguments.
CASES: dict[str, tuple[str, tuple[dict[str, Any], ...], dict[str, Any]]] = {
    "llama-jumprelu-and-standard": (
        "llama",
        ({"architecture": "jumprelu"}, {"architecture": "standard", "layer": 2, "seed": 1}),
        {"sink_norm": 60.0},
    ),
    "qwen3-gated-resid-pre": (
        "qwen3",
        ({"architecture": "gated", "layer": 2, "hook_kind": "hook_resid_pre"},),
        {},
    ),
    "gemma2-branches": (
        "gemma2",
        (
            {"architecture": "jumprelu", "hook_kind": "hook_mlp_out"},
            {"architecture": "standard", "hook_kind": "hook_attn_out", "seed": 1},
        ),
        {},
    ),
    "mixtral-and-its-mlp": (
        "mixtral",
        (
            {"architecture": "jumprelu"},
            {"architecture": "standard", "layer": 3, "hook_kind": "hook_mlp_out", "seed": 1},
        ),
        {},
    ),
    "gpt2-topk-and-layer-norm": (
        "gpt2",
        (
            {"architecture": "topk", "k": 8},
            {
                "architecture": "standard",
                "layer": 2,
                "seed": 1,
                "config": {"normalize_activations": "layer_norm"},
            },
        ),
        {},
    ),
}


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


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    family, saes, arguments = CASES[request.param]
    engine = tiny_engine(
        tiny_model(family), tmp_path_factory.mktemp("saes"), saes, max_num_seqs=6, **arguments
    )
    reference = ReferenceModel(tiny_model(family), SPECIAL_TOKEN_IDS)
    reference_saes = {
        name: ReferenceSAE(path, arguments.get("sink_norm")) for name, path in engine.saes.items()
    }
    yield engine, reference, reference_saes
    engine.shut_down()


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


def test_steered_log_probabilities_agree_with_transformers_and_hooks(
    case: tuple[Engine, ReferenceModel, dict[str, ReferenceSAE]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine, reference, saes = case
    plain = prompts(8, seed=0)
    unsteered = max(
        found
        for made in engine.generate(plain, [None] * len(plain))
        if (found := difference(made, None, reference, saes)) is not None
    )
    assert unsteered < TOLERANCE
    worst = effect = 0.0
    compared = 0

    texts = prompts(SPECS_A_CASE, seed=1)
    specs = drawn(fields(list(saes)), SPECS_A_CASE)
    for made, field in zip(engine.generate(texts, specs), specs, strict=True):
        found = difference(made, field, reference, saes)
        if found is None:
            continue
        assert found < TOLERANCE, (found, field)
        worst = max(worst, found)
        compared += 1
        clean = reference.logprobs(made.prompt, made.tokens, saes, None)
        changes = [
            abs(float(clean[i, t]) - logprob)
            for i, (t, logprob) in enumerate(zip(made.tokens, made.logprobs, strict=True))
        ]
        effect = max(effect, *changes)

    assert compared >= LEAST_SPECS
    assert effect > 1.0, "the edits of this test do nothing"
    with capsys.disabled():
        print(
            f"\n  log-probabilities, vLLM against transformers: unsteered {unsteered:.1e}, "
            f"steered {worst:.1e} over {compared} specs "
            f"(edits change them by up to {effect:.1f})"
        )
