"""Where vLLM's attentions hand the outputs of their heads to a projection, by their code."""

from __future__ import annotations

import importlib
from typing import Final

import pytest
import torch
from torch import nn

from steering.vllm.forward_trace import NotUnderstood
from steering.vllm.head_outputs import heads_projection


class Projection(nn.Module):
    """Whatever else an attention calls."""

    input_size = 32


class Heads(nn.Module):
    """As wide as the projection's input."""

    num_heads, head_size = 4, 8


#: vLLM's attentions that hand the heads' outputs to a projection as they are, and its name.
ATTENTIONS: Final = {
    ("llama", "LlamaAttention"): "o_proj",
    ("qwen2", "Qwen2Attention"): "o_proj",
    ("qwen3", "Qwen3Attention"): "o_proj",
    ("qwen3_moe", "Qwen3MoeAttention"): "o_proj",
    ("gemma2", "Gemma2Attention"): "o_proj",
    ("gemma3", "Gemma3Attention"): "o_proj",
    ("mistral", "MistralAttention"): "o_proj",
    ("mixtral", "MixtralAttention"): "o_proj",
    ("gpt_oss", "OAIAttention"): "o_proj",
    ("gpt2", "GPT2Attention"): "c_proj",
}


def attention(module: str, name: str) -> nn.Module:
    """An attention of vLLM's by its class's code, with nothing in its modules."""
    cls = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    made: nn.Module = cls.__new__(cls)
    nn.Module.__init__(made)
    projections = ("qkv_proj", "c_attn", "qkv", "o_proj", "c_proj")
    for child in (*projections, "rotary_emb", "q_norm", "k_norm"):
        setattr(made, child, Projection())
    made.attn = Heads()
    vars(made).update(q_size=32, kv_size=32, num_heads=4, num_kv_heads=4, head_dim=8)
    vars(made).update(qk_norm=False, do_llama_4_scaling=False, attn_output_gate=True)
    return made


@pytest.mark.parametrize("module", ATTENTIONS)
def test_the_heads_of_vllms_attentions_are_found(module: tuple[str, str]) -> None:
    found = heads_projection(attention(*module), torch.bfloat16, 1)
    assert found == ATTENTIONS[module]


def test_heads_behind_a_gate_of_vllms_are_refused() -> None:
    with pytest.raises(NotUnderstood, match="something stands between the heads"):
        heads_projection(attention("qwen3_next", "Qwen3NextAttention"), torch.bfloat16, 1)
