"""Engine settings that steering cannot honour, refused at start rather than served wrongly."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


class UnsupportedEngineError(ValueError):
    """An engine setting would make edits wrong or drop them."""


def refuse_unknown_runner(runner: Any, known: tuple[str, str]) -> None:
    """Check that a model runner is, or descends from, the one that an adapter knows.

    Args:
        runner: the worker's model runner.
        known: module and name of its class.

    Raises:
        UnsupportedEngineError: it does not.
    """
    if known not in {(base.__module__, base.__qualname__) for base in type(runner).__mro__}:
        raise UnsupportedEngineError(
            f"SAE steering does not know the model runner {type(runner).__qualname__}"
        )


def refuse_unsupported(vllm_config: Any) -> None:
    """Check a ``VllmConfig`` whose ``additional_config`` asks for steering.

    Raises:
        UnsupportedEngineError: naming the setting and why.
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


def refuse_rescaled_stream(model: nn.Module, dtype: torch.dtype) -> None:
    """Check that a model's layers do not divide the stream by a factor of their own.

    DeepSeek-V2's and its kin do in float16, at their first layer and in every branch, against
    overflow. Norms take the factor out again; an SAE would read, and an edit write, the stream at
    the wrong scale.

    Args:
        model: as loaded, before it is hooked.
        dtype: of the model.

    Raises:
        UnsupportedEngineError: naming the layers' class and what to write.
    """
    if dtype != torch.float16:
        return
    for kind in {type(module) for module in model.modules()}:
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        if code is not None and {"routed_scaling_factor", "float16"} <= set(code.co_names):
            raise UnsupportedEngineError(
                f"SAE steering does not work with {kind.__name__} in float16, in which it divides "
                "the stream by routed_scaling_factor; use --dtype bfloat16"
            )
