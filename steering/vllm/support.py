"""Engine settings that steering cannot honour, refused at start rather than served wrongly."""

from __future__ import annotations

from typing import Any

import torch


class UnsupportedEngineError(ValueError):
    """An engine setting, or the installed vLLM, would make edits wrong or lose them."""


def refuse_unknown_runner(runner: Any, known: tuple[str, str]) -> None:
    """Check that a model runner's class is, or descends from, the one that an adapter knows.

    Args:
        runner: the worker's model runner.
        known: module and name of the class that the adapter knows.

    Raises:
        UnsupportedEngineError: if it does not.
    """
    if known not in {(base.__module__, base.__qualname__) for base in type(runner).__mro__}:
        raise UnsupportedEngineError(
            f"SAE steering does not know the model runner {type(runner).__qualname__}"
        )


def refuse_unsupported(vllm_config: Any) -> None:
    """Check a ``VllmConfig`` whose ``additional_config`` asks for steering.

    Raises:
        UnsupportedEngineError: if steering cannot honour a setting. It names the setting and the
            reason.
    """
    parallel = vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    refusals = (
        (vllm_config.model_config.is_encoder_decoder, "an encoder-decoder model"),
        (vllm_config.model_config.runner_type != "generate", "a pooling model"),
        (
            parallel.enable_hc_sp and parallel.tensor_parallel_size > 1,
            "sequence parallelism (--enable-hc-sp), which shards the stream",
        ),
        (
            parallel.use_sequence_parallel_moe,
            "sequence-parallel experts (--enable-expert-parallel with both tensor and data "
            "parallelism), which shard the stream",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "prefill context parallelism, which shards the batch",
        ),
        (
            parallel.use_ubatching,
            "micro-batching (--enable-dbo), which runs the layers on parts of the batch",
        ),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "--kv-sharing-fast-prefill, which drops tokens between layers",
        ),
        (
            speculative is not None and speculative.enable_adaptive_verification,
            "adaptive verification, which drops tokens on the device",
        ),
    )
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        raise UnsupportedEngineError(
            f"SAE steering does not work with a float32 matmul precision of {precision}, in which "
            "activations would not be read in float32; unset VLLM_FLOAT32_MATMUL_PRECISION, or "
            "call torch.set_float32_matmul_precision('highest')"
        )
    for refused, what in refusals:
        if refused:
            raise UnsupportedEngineError(f"SAE steering does not work with {what}")
