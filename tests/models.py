"""Tiny random checkpoints and SAEs for engine tests: real architectures, made in a second.

Every model has `D_MODEL` = 64, four layers, heads of size 32 (the smallest that vLLM's CPU
attention takes), and a head count that two tensor-parallel ranks can share. `python -m tests.models
llama gpt2` builds the named families and generates with each through vLLM and transformers.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

D_MODEL = 64
NUM_LAYERS = 4
VOCAB_SIZE = 320
MAX_LENGTH = 512

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0..3
UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n"
    "{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)

# What the merges are learnt from. Only ASCII is in the vocabulary, so any generated ids decode to
# whole characters; everything else in a prompt becomes <unk>.
TRAINING_TEXT = """\
The quick brown fox jumps over the lazy dog. A sparse autoencoder reads the residual stream of a \
model and writes it as a sum of a few features; each feature has a direction, and steering adds \
more of that direction, or takes it away. When the user asks the assistant a question, the \
assistant answers it. In 1984 the weather in the north was cold, and there was snow on the \
trees. She said that she would return to the house by the sea; he said nothing. def \
forward(self, x): return self.decode(self.encode(x)) What is the capital of France? The capital \
of France is Paris. How many words are there in this sentence?
"""

_GATED_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_GRANITE_FACTORS: dict[str, Any] = {
    "residual_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
_GRANITE_HYBRID: dict[str, Any] = {
    **_GRANITE_FACTORS,
    "num_attention_heads": 2,
    "shared_intermediate_size": 2 * D_MODEL,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "position_embedding_type": "rope",
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}

# transformers config class, config arguments that differ from the shared ones
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    # Qwen2's attention knows no head size of its own: hidden size over heads.
    "qwen2": ("Qwen2Config", {"num_attention_heads": 2}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": (
        "Gemma2Config",
        {"query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {"num_attention_heads": 2}),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_attention_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_GATED_DELTA_NET,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "partial_rotary_factor": 0.5,
        },
    ),
    "phi3": ("Phi3Config", {"num_attention_heads": 2, "sliding_window": None}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            "num_key_value_heads": 4,
            # On a CPU vLLM has latent attention of these sizes alone, and rotates its heads rightly
            # only with YaRN, as published models do.
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": MAX_LENGTH // 4,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
            "head_dim": 64,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "glm4": ("Glm4Config", {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {"num_attention_heads": 2}),
    "cohere": ("CohereConfig", {"num_attention_heads": 2, "tie_word_embeddings": True}),
    "cohere2": (
        "Cohere2Config",
        {"num_attention_heads": 2, "tie_word_embeddings": True, "sliding_window": 64},
    ),
    "exaone4": (
        "Exaone4Config",
        {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "granite": ("GraniteConfig", {"num_attention_heads": 2, **_GRANITE_FACTORS}),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {**_GRANITE_HYBRID, "layer_types": ["attention"] * NUM_LAYERS},
    ),
    "granite_mamba": (
        "GraniteMoeHybridConfig",
        {**_GRANITE_HYBRID, "layer_types": ["mamba", "attention"] * 2},
    ),
    "stablelm": ("StableLmConfig", {"num_attention_heads": 2, "partial_rotary_factor": 0.5}),
    "falcon_h1": (
        "FalconH1Config",
        {
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
    ),
}


def make_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0) -> Path:
    """Write a random float32 checkpoint of `family`, a key of `FAMILIES`, and its tokenizer.

    The weights depend on `family` and `seed` only. They are scaled so that attention and MLPs
    matter and the next-token distribution is neither flat nor one-hot, unlike transformers' own
    initialization, whose logits are all but equal and whose greedy text would hang on rounding.
    """
    import transformers

    config_class, differences = FAMILIES[family]
    if family == "gpt2":
        settings: dict[str, Any] = {
            "n_embd": D_MODEL,
            "n_layer": NUM_LAYERS,
            "n_head": 2,
            "n_positions": MAX_LENGTH,
        }
    else:
        settings = {
            "hidden_size": D_MODEL,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 2 * D_MODEL,
            "max_position_embeddings": MAX_LENGTH,
        }
    config = getattr(transformers, config_class)(
        vocab_size=VOCAB_SIZE,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
        **{"tie_word_embeddings": False, **settings, **differences},
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize(model: Any, seed: int) -> None:
    """Fill every parameter from `seed`: matrices keep the scale of what passes through them."""
    generator = torch.Generator().manual_seed(seed)
    tied: bool = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            # Norm gains and biases: what they are (ones, zeros), shaken a little.
            parameter.add_(noise, alpha=0.1)
            if tied and name.endswith("model.norm.weight"):
                parameter.add_(5.0)  # makes up for the small output embedding
        elif "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            # Where the output embedding is the same matrix (Gemma, which also multiplies by
            # sqrt(d_model)), a large one would predict every token's own repetition.
            parameter.copy_(noise * (0.06 if tied else 0.5))
        elif "lm_head" in name or "embed_out" in name:
            parameter.copy_(noise * 3.0 / math.sqrt(D_MODEL))
        else:
            fan_in = parameter.shape[-2] if "c_" in name else parameter.shape[-1]
            parameter.copy_(noise * 1.5 / math.sqrt(fan_in))


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` ASCII tokens that starts a prompt with ``<s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The byte-level alphabet writes a space as Ġ, a newline as Ċ and a tab as ĉ.
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĉ"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_LENGTH,
    )
    fast.chat_template = CHAT_TEMPLATE
    assert len(fast) == VOCAB_SIZE
    return fast


def make_tiny_sae(
    folder: Path,
    *,
    d_in: int = D_MODEL,
    d_sae: int = 128,
    architecture: str = "jumprelu",
    layer: int = 1,
    hook_kind: str = "hook_resid_post",
    seed: int = 0,
    k: int = 8,
    threshold: float = 0.5,
    dtype: torch.dtype = torch.float32,
    config: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    features: Sequence[dict[str, Any]] | None = None,
) -> Path:
    """Write a random SAE to `folder` as SAELens does (``cfg.json``, ``sae_weights.safetensors``).

    `architecture` is ``standard``, ``jumprelu`` (with `threshold` for every latent), ``gated`` or
    ``topk`` (with `k`). Encoder and decoder rows have norm 1, so on a residual stream of norm r an
    activation is of the order r / sqrt(d_in) and fewer than half of them exceed 0.5. `config` and
    `metadata` are merged into the configuration (``{"sink_norm": 100.0}``, say); `features` become
    ``features.jsonl``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tensors = {
        "W_enc": nn.functional.normalize(normal(d_in, d_sae), dim=0),  # [d_in, d_sae]
        "W_dec": nn.functional.normalize(normal(d_sae, d_in), dim=1),  # [d_sae, d_in]
        "b_dec": normal(d_in, scale=0.1),
    }
    extra: dict[str, Any] = {}
    if architecture == "gated":
        tensors["b_gate"] = normal(d_sae, scale=0.1)
        tensors["b_mag"] = normal(d_sae, scale=0.1)
        tensors["r_mag"] = normal(d_sae, scale=0.1)
    elif architecture in ("standard", "jumprelu", "topk"):
        tensors["b_enc"] = normal(d_sae, scale=0.1)
    else:
        raise ValueError(f"architecture {architecture} is not standard, jumprelu, gated or topk")
    if architecture == "jumprelu":
        tensors["threshold"] = torch.full((d_sae,), threshold)
    if architecture == "topk":
        extra = {"k": k, "rescale_acts_by_decoder_norm": False}

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
        folder / "sae_weights.safetensors",
    )
    cfg = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **extra,
        **(config or {}),
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": "tiny",
            "hook_name": f"blocks.{layer}.{hook_kind}",
            **(metadata or {}),
        },
    }
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n")
    if features is not None:
        lines = "".join(json.dumps(feature, ensure_ascii=False) + "\n" for feature in features)
        (folder / "features.jsonl").write_text(lines, encoding="utf-8")
    return folder


def resemble(folder: Path) -> None:
    """Give a tiny SAE decoder rows that resemble its encoder rows, as those of trained ones do."""
    file = folder / "sae_weights.safetensors"
    tensors = load_file(file)
    mixed = tensors["W_enc"].T + 0.6 * tensors["W_dec"]
    save_file({**tensors, "W_dec": nn.functional.normalize(mixed, dim=1).contiguous()}, file)


def main(families: Sequence[str]) -> None:
    """Build each family in a temporary folder and let vLLM and transformers generate from it."""
    import tempfile

    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    for family in families:
        with tempfile.TemporaryDirectory() as temporary:
            folder = make_tiny_model(Path(temporary), family)
            tokenizer = make_tokenizer()
            llm = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256)
            params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
            output = llm.generate(["The quick brown fox"], params)[0].outputs[0]
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            ids = torch.tensor([tokenizer.encode("The quick brown fox")])
            with torch.no_grad():
                expected = model.generate(
                    ids, max_new_tokens=24, do_sample=False, eos_token_id=None
                )
            own = expected[0, ids.shape[1] :].tolist()
            print(
                family, "equal" if own == list(output.token_ids) else f"{own} != {output.token_ids}"
            )
            print(repr(output.text))
            del llm


if __name__ == "__main__":
    main(sys.argv[1:] or list(FAMILIES))
