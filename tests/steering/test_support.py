"""What is refused at start: engine settings and runners that would lose edits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steering.vllm import runner_v1, runner_v2
from steering.vllm.support import (
    UnsupportedEngineError,
    refuse_unknown_runner,
    refuse_unsupported,
)

#: What a `VllmConfig` must not say, and a word of the line that refuses it.
REFUSED: dict[tuple[str, str], tuple[Any, str]] = {
    ("model_config", "is_encoder_decoder"): (True, "encoder-decoder"),
    ("model_config", "runner_type"): ("pooling", "pooling"),
    ("parallel_config", "enable_hc_sp"): (True, "--enable-hc-sp"),
    ("parallel_config", "use_sequence_parallel_moe"): (True, "--enable-expert-parallel"),
    ("parallel_config", "prefill_context_parallel_size"): (2, "context parallelism"),
    ("parallel_config", "use_ubatching"): (True, "--enable-dbo"),
    ("cache_config", "kv_sharing_fast_prefill"): (True, "--kv-sharing-fast-prefill"),
    ("speculative_config", "enable_adaptive_verification"): (True, "adaptive verification"),
}


def engine_config() -> SimpleNamespace:
    """A `VllmConfig` that steering works with."""
    return SimpleNamespace(
        model_config=SimpleNamespace(is_encoder_decoder=False, runner_type="generate"),
        parallel_config=SimpleNamespace(
            enable_hc_sp=False,
            tensor_parallel_size=2,
            use_sequence_parallel_moe=False,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        speculative_config=SimpleNamespace(enable_adaptive_verification=False),
    )


def test_an_ordinary_configuration_is_served() -> None:
    config = engine_config()
    refuse_unsupported(config)
    config.speculative_config = None
    refuse_unsupported(config)


@pytest.mark.parametrize("setting", REFUSED, ids=".".join)
def test_a_setting_that_would_lose_edits_is_refused_by_name(setting: tuple[str, str]) -> None:
    config = engine_config()
    value, word = REFUSED[setting]
    setattr(getattr(config, setting[0]), setting[1], value)
    with pytest.raises(UnsupportedEngineError, match=word):
        refuse_unsupported(config)


def test_sequence_parallel_experts_are_what_vllm_calls_so() -> None:
    from vllm.config import ParallelConfig

    def sharded(**sizes: int) -> bool:
        parallel = ParallelConfig(enable_expert_parallel=True, **sizes)
        return bool(parallel.use_sequence_parallel_moe)

    assert sharded(tensor_parallel_size=2, data_parallel_size=2)
    assert not sharded(tensor_parallel_size=2)


@pytest.mark.parametrize("known", [runner_v1.RUNNER, runner_v2.RUNNER], ids=["v1", "v2"])
def test_a_runner_is_known_by_its_class_or_one_above_it(known: tuple[str, str]) -> None:
    base = type(known[1], (), {"__module__": known[0]})
    refuse_unknown_runner(type("CPUModelRunner", (base,), {})(), known)
    stranger = type(known[1], (), {"__module__": "vllm_other.runner"})
    with pytest.raises(UnsupportedEngineError, match="does not know the model runner"):
        refuse_unknown_runner(stranger(), known)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_matmul_precision_below_float32_is_refused(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.raises(UnsupportedEngineError, match=f"{precision}.*VLLM_FLOAT32_MATMUL"):
            refuse_unsupported(engine_config())
    finally:
        torch.set_float32_matmul_precision("highest")
