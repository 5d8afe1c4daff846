"""What is said of an SAE on real tokens: figures worked by hand, then what each of them means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.registry import RegistryFacts
from sae.self_check import (
    ENOUGH_TOKENS,
    Measured,
    Observed,
    Outcome,
    Stated,
    is_other_training,
    stated_by,
)
from sae.source import ResolvedSAE, SAEReference, resolve
from tests.models import make_tiny_sae
from tests.sae.cards import CARD
from tests.sae.suites import write_gemma_scope

# Four tokens around a mean of 0: their squared distances from it sum to 4 * 4 = 16.
SQUARE = [[2, 0], [0, 2], [-2, 0], [0, -2]]


def observe(
    x: Sequence[Sequence[float]], error: float = 0.0, l0: Sequence[int] | None = None
) -> Observed:
    """Tokens at positions 1, 2, ..., each reconstructed with `error` too much in its last place."""
    stream = np.array(x, dtype=np.float32)
    x_hat = stream.copy()
    x_hat[:, -1] += error
    observed = Observed()
    fire = np.array(l0 or [1] * len(stream))
    observed.put(np.arange(1, len(stream) + 1), stream, x_hat, fire)
    return observed


# Measuring


def test_variance_explained_is_one_less_the_error_over_the_spread() -> None:
    measured = observe(SQUARE, error=1.0, l0=[1, 2, 3, 4]).measured(limit=99)
    assert measured == Measured(4, 0, 2.5, 1 - 4 / 16, median_norm=2.0)


def test_spread_is_around_the_mean() -> None:
    shifted = [[a + 100, b] for a, b in SQUARE]
    assert observe(shifted, error=1.0).measured(99).variance_explained == 1 - 4 / 16


def test_reconstruction_worse_than_the_mean_explains_less_than_nothing() -> None:
    assert observe(SQUARE, error=4.0).measured(99).variance_explained == 1 - 64 / 16


def test_token_that_is_computed_again_counts_once() -> None:
    observed = observe(SQUARE, error=1.0, l0=[1, 2, 3, 4])
    x = np.array([[2, 0]], dtype=np.float32)
    observed.put(np.array([1]), x, x + np.array([[0, 3]], dtype=np.float32), np.array([5]))
    measured = observed.measured(99)
    assert (measured.tokens, measured.l0) == (4, (5 + 2 + 3 + 4) / 4)
    assert measured.variance_explained == 1 - (9 + 3) / 16


def test_positions_past_the_limit_do_not_count() -> None:
    observed = observe([*SQUARE, [50, 50]], l0=[1, 1, 1, 1, 99])
    assert observed.measured(limit=5) == Measured(4, 0, 1.0, 1.0, 2.0)


def test_token_of_more_than_ten_times_the_median_norm_is_a_sink() -> None:
    observed = observe([*SQUARE, [20, 0], [20.5, 0]], l0=[1, 1, 1, 1, 7, 100])
    measured = observed.measured(99)
    assert (measured.tokens, measured.sinks) == (5, 1)
    assert measured.l0 == (4 + 7) / 5


def test_nothing_measured_is_not_a_number() -> None:
    measured = Observed().measured(99)
    assert measured.tokens == 0
    assert math.isnan(measured.l0)
    assert math.isnan(measured.variance_explained)


@pytest.mark.parametrize("x", [[[1, 2]] * 4, [[1, 2], [math.nan, 0], [3, 1]]], ids=["flat", "nan"])
def test_stream_that_does_not_vary_or_is_not_finite_has_no_variance_explained(x: Any) -> None:
    assert math.isnan(observe(x).measured(99).variance_explained)


def test_memory_held_grows_with_the_tokens() -> None:
    assert observe(SQUARE).nbytes > observe(SQUARE[:2]).nbytes >= 2 * 2 * 4


# What it means

STATED = Stated(l0=28.8, variance_explained=0.8)


def outcome(
    l0: float = 30.0,
    variance: float = 0.8,
    tokens: int = 400,
    stated: Stated = STATED,
    sinks: int = 0,
    model: str = "some/model",
    **card: Any,
) -> Outcome:
    measured = Measured(tokens, sinks, l0, variance)
    return Outcome(replace(CARD, **card), measured, stated, model)


def test_values_near_the_stated_ones_are_no_complaint() -> None:
    found = outcome()
    assert found.complaints == []
    assert found.line() == (
        "SAE 'l15' at blocks.15.hook_resid_post: L0 30.0 (stated 28.8), "
        "variance explained 0.80 (stated 0.80) on 400 tokens"
    )


def test_line_names_sinks_and_leaves_out_what_is_not_stated() -> None:
    assert outcome(stated=Stated(), sinks=2).line().endswith(
        "L0 30.0, variance explained 0.80 on 400 tokens (sinks left out: 2)"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (outcome(l0=57.7), "L0 is 2 times what is stated; likely the wrong layer, hook or model"),
        (outcome(l0=14.0), "L0 is 0.49 times what is stated; likely the wrong layer"),
        (outcome(variance=0.64), "variance explained is 0.16 below what is stated; likely the"),
        (outcome(variance=0.29, stated=Stated()), "variance explained is low; likely the wrong"),
        (
            outcome(variance=-0.4),
            "the mean of the stream would reconstruct it better; likely the wrong layer, hook or "
            "model (base for instruct, say), or the wrong architecture or input scale",
        ),
        # More than a tenth of 4608 on each token.
        (
            outcome(l0=508, variance=0.37, architecture="standard"),
            "L0 is 18 times what is stated; 11% of all features fire on each token; "
            "variance explained is 0.43 below what is stated; likely not the architecture "
            "(standard) that it was trained as: a threshold or a top k is left out",
        ),
        (outcome(l0=508, stated=Stated()), "11% of all features fire on each token; likely not"),
        (outcome(variance=math.nan), "does not vary or is not finite"),
        (
            outcome(model="google/gemma-2-2b-it", stated=Stated(model="gemma-2-2b"), variance=0.5),
            "it was trained on gemma-2-2b and this is google/gemma-2-2b-it: one is the base "
            "model, the other its instruct version",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_misfit_is_said_in_one_line(found: Outcome, said: str) -> None:
    assert said in found.line()
    assert "\n" not in found.line()
    assert found.complaints


@pytest.mark.parametrize(
    "found",
    [
        outcome(l0=57.5),
        outcome(l0=14.5),
        outcome(variance=0.66),
        outcome(variance=0.31, stated=Stated()),
        outcome(variance=-0.1, stated=Stated(variance_explained=-0.05)),
        # A small SAE may be dense where its files say so, or where it was made with that k.
        outcome(l0=32, stated=Stated(l0=32), d_sae=128),
        outcome(l0=32, stated=Stated(), d_sae=128, architecture="topk"),
    ],
)
def test_what_lies_within_the_bounds_is_no_complaint(found: Outcome) -> None:
    assert found.complaints == []


def test_few_tokens_are_not_judged_by() -> None:
    found = outcome(l0=400, variance=-3, tokens=ENOUGH_TOKENS - 1)
    assert found.complaints == []
    assert found.line().endswith("fewer than 64 tokens are too few to judge by")
    assert outcome(l0=400, variance=-3, tokens=ENOUGH_TOKENS).complaints
    nothing = outcome(l0=math.nan, variance=math.nan, tokens=0)
    assert (nothing.complaints, len(nothing.remarks)) == ([], 1)


@pytest.mark.parametrize(
    ("trained_on", "served", "other"),
    [
        ("gemma-2-2b", "google/gemma-2-2b-it", True),
        ("google/gemma-3-1b-it", "google/gemma-3-1b-pt", True),
        ("gemma-2-2b", "google/gemma-2-2b-pt", False),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", True),
        ("SmolLM2-135M", "/models/SmolLM2-135M-Instruct-0.1.2-1/", True),
        ("SmolLM2-135M-Instruct", "/models/SmolLM2-135M-Instruct-AWQ", False),
        ("gemma-2-2b", "google/gemma-2-9b-it", False),
        ("gpt2-small", "/models/mine", False),
        ("gemma-2-2b", "google/gemma-2-2b", False),
    ],
)
def test_base_and_instruct_are_told_by_the_models_names(
    trained_on: str, served: str, other: bool
) -> None:
    assert is_other_training(trained_on, served) is other


# What is stated


def stated_of(path: Path, exactly_k: bool = False) -> Stated:
    return stated_by(resolve(SAEReference.parse(f"a={path}")), exactly_k=exactly_k)


@pytest.mark.parametrize(
    ("name", "l0", "fvu"), [("smollm2-135m-l14", 32.4, 0.179), ("smollm2-135m-l22", 31.9, 0.204)]
)
def test_shipped_saes_state_their_values(demo_sae: Path, name: str, l0: float, fvu: float) -> None:
    stated = stated_of(demo_sae.with_name(name))
    assert (stated.l0, stated.model) == (l0, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert stated.variance_explained == pytest.approx(1 - fvu)


def test_folder_of_gemma_scope_states_l0(tmp_path: Path) -> None:
    assert stated_of(write_gemma_scope(tmp_path)) == Stated(l0=20.0, model="gemma-2-2b")


def test_sparsity_aimed_at_stands_in_for_l0(tmp_path: Path) -> None:
    sae = make_tiny_sae(tmp_path / "a", metadata={"k": 32, "explained_variance": 0.7})
    assert stated_of(sae) == Stated(l0=32.0, variance_explained=0.7, model="tiny")


def test_k_of_a_top_k_sae_says_nothing_that_could_be_wrong(tmp_path: Path) -> None:
    sae = make_tiny_sae(tmp_path / "a", architecture="topk", k=8)
    assert stated_of(sae, exactly_k=True).l0 is None
    stated = make_tiny_sae(tmp_path / "b", architecture="topk", k=8, metadata={"l0": 7.5})
    assert stated_of(stated, exactly_k=True).l0 == 7.5


def test_value_that_can_be_none_is_passed_over(tmp_path: Path) -> None:
    values = {"l0": 0, "fvu": "low", "variance_explained": 75.0, "frac_variance_explained": True}
    sae = make_tiny_sae(tmp_path / "a", metadata={**values, "model_name": None})
    assert stated_of(sae) == Stated()


def test_registry_states_what_the_files_do_not(tmp_path: Path) -> None:
    sae = make_tiny_sae(tmp_path / "a", metadata={"model_name": None})
    facts = RegistryFacts(model="gemma-2-2b", l0=71, variance_explained=0.8)
    reference = ResolvedSAE("a", "sae_lens://release/id", path=str(sae), facts=facts)
    assert stated_by(reference, exactly_k=False) == Stated(71, 0.8, "gemma-2-2b")


@pytest.mark.parametrize(
    ("repository", "model"),
    [
        ("gemma-scope-9b-it-res", "gemma-2-9b-it"),
        ("models--google--gemma-scope-9b-it-res", "gemma-2-9b-it"),
        ("gemma-scope-27b-pt-res", "gemma-2-27b"),
    ],
)
def test_repository_of_gemma_scope_names_the_model_and_the_registry_does_not(
    tmp_path: Path, repository: str, model: str
) -> None:
    folder = write_gemma_scope(tmp_path / "written")
    moved = tmp_path / repository / "layer_3" / "width_16k" / "average_l0_20"
    moved.parent.mkdir(parents=True)
    folder.rename(moved)
    source = "sae_lens://gemma-scope-9b-it-res/layer_3"
    reference = ResolvedSAE("a", source, str(moved), facts=RegistryFacts(model="gemma-2-9b"))
    stated = stated_by(replace(reference, hook="blocks.3.hook_resid_post"), exactly_k=False)
    assert stated.model == model
    assert is_other_training(model, f"google/{model}") is False
