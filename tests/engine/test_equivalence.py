"""vLLM with steering against transformers with hooks, on random specs over real architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.draws import (
    TOLERANCE,
    difference,
    drawn,
    fields,
    prompts,
)
from tests.engine.engine import SPECIAL_TOKEN_IDS, Engine, tiny_engine
from tests.engine.reference import ReferenceModel, ReferenceSAE

SPECS_A_CASE = 130
LEAST_SPECS = 100
SPECS_SHOWN_TO_ACT = 24

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
        if compared > SPECS_SHOWN_TO_ACT:
            continue
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
