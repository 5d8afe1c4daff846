"""What is refused at start: engine settings, runners and models whose stream would be missed."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae.card import HookPoint
from steering.vllm import hook_points, runner_v1, runner_v2
from steering.vllm.hook_points import UnsupportedModelError
from steering.vllm.support import (
    UnsupportedEngineError,
    refuse_rescaled_stream,
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


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("deepseek_v2", "DeepseekV2DecoderLayer"),
        ("AXK1", "AXK1DecoderLayer"),
        ("openpangu", "OpenPanguDecoderLayer"),
    ],
)
def test_a_model_of_vllms_that_rescales_its_stream_is_refused_in_float16_only(
    module: str, name: str
) -> None:
    kind = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    with pytest.raises(UnsupportedEngineError, match=f"{name} in float16.*--dtype bfloat16"):
        refuse_rescaled_stream(model(layer), torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        refuse_rescaled_stream(model(layer), dtype)


def test_a_model_that_keeps_its_scale_is_served_in_float16() -> None:
    from vllm.model_executor.models.glm4_moe import Glm4MoeDecoderLayer
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    for kind in (LlamaDecoderLayer, Glm4MoeDecoderLayer):
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        refuse_rescaled_stream(model(layer), torch.float16)


class Attention(nn.Module):
    """Returns what it is told to."""

    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden_states: Tensor) -> Any:
        return hidden_states if self.output is None else self.output


class Layer(nn.Module):
    """A plain decoder layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Nameless(Layer):
    """A layer whose stream has another name."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def model(*layers: nn.Module) -> nn.Module:
    found = nn.Module()
    found.layers = nn.ModuleList(layers)
    return found


def test_two_lists_that_could_be_the_layers_are_refused() -> None:
    twice = nn.Module()
    twice.encoder, twice.decoder = model(Layer(Attention())), model(Layer(Attention()))
    with pytest.raises(UnsupportedModelError, match=r"found encoder\.layers, decoder\.layers"):
        hook_points.decoder_layers(twice, 1)
    with pytest.raises(UnsupportedModelError, match=r"expected one list of 3 .* found none"):
        hook_points.decoder_layers(twice, 3)


def test_a_layer_without_a_stream_by_name_is_refused() -> None:
    point = HookPoint.parse("blocks.0.hook_resid_post")
    with pytest.raises(UnsupportedModelError, match="has no parameter hidden_states"):
        hook_points.install(model(Nameless(Attention())), point, 1, tensor_parallel=1)


def test_a_layer_without_the_branch_is_refused() -> None:
    point = HookPoint.parse("blocks.0.hook_mlp_out")
    with pytest.raises(UnsupportedModelError, match="has none of mlp"):
        hook_points.install(model(Layer(Attention())), point, 1, tensor_parallel=1)


def test_partial_sums_are_refused_under_tensor_parallelism_only() -> None:
    attention = Attention()
    attention.o_proj = nn.Linear(2, 2)
    attention.o_proj.reduce_results = False  # type: ignore[assignment]
    point = HookPoint.parse("blocks.0.hook_attn_out")
    with pytest.raises(UnsupportedModelError, match="o_proj leaves partial sums"):
        hook_points.install(model(Layer(attention)), point, 1, tensor_parallel=2)
    hook_points.install(model(Layer(attention)), point, 1, tensor_parallel=1)


class Deferring(Layer):
    """Leaves its sum to the next layer's norm."""

    def forward(self, hidden_states: Tensor, attn_in: Tensor | None = None) -> Tensor:
        return fused_allreduce_rms_norm(hidden_states)


def fused_allreduce_rms_norm(hidden_states: Tensor) -> Tensor:
    """As vLLM names it."""
    return hidden_states


@pytest.mark.parametrize("kind", ["hook_resid_pre", "hook_resid_post"])
def test_sums_left_to_the_next_layer_are_refused_under_tensor_parallelism_only(kind: str) -> None:
    point = HookPoint(1, kind)
    two = model(Deferring(Attention()), Deferring(Attention()))
    with pytest.raises(UnsupportedModelError, match="leaves the sum over tensor-parallel ranks"):
        hook_points.install(two, point, 2, tensor_parallel=2)
    hook_points.install(two, point, 2, tensor_parallel=1)


def test_an_input_that_bypasses_the_edit_is_refused() -> None:
    two = model(Deferring(Attention()), Deferring(Attention()))
    with pytest.raises(UnsupportedModelError, match="may take its attention's input ready-made"):
        hook_points.install(two, HookPoint(0, "hook_resid_pre"), 2, tensor_parallel=1)


def test_a_forward_that_somebody_else_has_put_in_front_is_refused() -> None:
    layer = Layer(Attention())
    layer.forward = lambda hidden_states: hidden_states  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="--offload-backend"):
        hook_points.install(model(layer), HookPoint(0, "hook_resid_post"), 1, tensor_parallel=1)


@pytest.mark.parametrize("output", ["text", (torch.ones(2, 3), torch.ones(2, 3))])
def test_an_output_that_could_be_either_tensor_is_refused(output: Any) -> None:
    point = HookPoint.parse("blocks.0.hook_attn_out")
    attention = Attention(output)
    hook_points.install(model(Layer(attention)), point, 1, tensor_parallel=1)
    with pytest.raises(UnsupportedModelError, match="the module returns"):
        attention(torch.ones(2, 3))
