"""Small transcoders, crosscoders and SAEs of heads in the layouts that they are published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.sae.suites import (
    D_IN,
    D_SAE,
    gemma_scope_2_tensors,
    linear_tensors,
    sae_lens_tensors,
    weights,
    write_llama_scope,
)

LAYERS = 6


def skip(seed: int = 9) -> Tensor:
    """W_skip [d, d]."""
    return torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(seed)) / 4


def decoders(places: int, seed: int = 11) -> Tensor:
    """W_dec [d_sae, places, d]."""
    return torch.randn(D_SAE, places, D_IN, generator=torch.Generator().manual_seed(seed))


def write_sae_lens_transcoder(
    folder: Path, architecture: str, metadata: dict[str, Any] | None = None
) -> Path:
    """As SAELens 6 saves one."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = sae_lens_tensors("jumprelu" if "jumprelu" in architecture else "standard")
    if "skip" in architecture:
        tensors["W_skip"] = skip()
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_out": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.0",
            "model_name": "meta-llama/Llama-3.2-1B",
            "hook_name": "blocks.3.ln2.hook_normalized",
            "hook_name_out": "blocks.3.hook_mlp_out",
        }
        | (metadata or {}),
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def affine_tensors(affine: bool) -> dict[str, Tensor]:
    """The skip connection of Gemma Scope 2's transcoders, where there is one."""
    return {"affine_skip_connection": skip().T.contiguous()} if affine else {}


def write_gemma_scope_2_transcoder(
    root: Path, *, affine: bool = True, config: bool = True, site: str = "transcoder_all"
) -> Path:
    end = "_affine" if affine else ""
    folder = root / "gemma-scope-2-270m-pt" / site / f"layer_3_width_16k_l0_small{end}"
    folder.mkdir(parents=True)
    save_file(
        gemma_scope_2_tensors(weights()["W_dec"]) | affine_tensors(affine),
        folder / "params.safetensors",
    )
    if config:
        said = {
            "architecture": "jump_relu",
            "model_name": "google/gemma-3-270m",
            "affine_connection": affine,
            "type": "transcoder",
            "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
            "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
        }
        (folder / "config.json").write_text(json.dumps(said))
    return folder


def write_gemma_scope_2_clt(root: Path, *, config: bool = True, affine: bool = True) -> Path:
    folder = root / "gemma-scope-2-270m-pt" / "clt" / "width_262k_l0_big_affine"
    folder.mkdir(parents=True)
    for layer in range(LAYERS):
        save_file(
            gemma_scope_2_tensors(decoders(LAYERS, seed=layer)) | affine_tensors(affine),
            folder / f"params_layer_{layer}.safetensors",
        )
    if config:
        said = {
            "architecture": "jump_relu",
            "type": "clt",
            "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
        }
        (folder / "config.json").write_text(json.dumps(said))
    return folder


def write_crosscoder(root: Path, *, config: bool = True) -> Path:
    """Of layers 5, 9 and 12."""
    folder = root / "gemma-scope-2-270m-pt" / "crosscoder" / "layer_5_9_12_width_65k_l0_big"
    folder.mkdir(parents=True)
    for slot in range(3):
        save_file(
            gemma_scope_2_tensors(decoders(3, seed=slot)),
            folder / f"params_layer_{slot}.safetensors",
        )
    if config:
        point = "model.layers.{5,9,12}.output"
        said = {"architecture": "jump_relu", "type": "crosscoder"}
        said |= {"hf_hook_point_in": point, "hf_hook_point_out": point}
        (folder / "config.json").write_text(json.dumps(said))
    return folder


def write_circuit_tracer(
    folder: Path,
    *,
    layers: int = 2,
    threshold: bool = False,
    with_skip: bool = False,
    config: dict[str, Any] | None = None,
) -> Path:
    """A set of a transcoder a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(layers):
        w = weights(seed=layer)
        tensors = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        if threshold:
            tensors["activation_function.threshold"] = w["threshold"]
        if with_skip:
            tensors["W_skip"] = skip()
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    write_set_config(folder, "transcoder_set", config)
    return folder


def write_set_config(folder: Path, kind: str, changes: dict[str, Any] | None = None) -> None:
    said = {
        "model_name": "Qwen/Qwen3-4B",
        "model_kind": kind,
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "qwen3-4b",
    } | (changes or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(said))


def write_circuit_tracer_clt(folder: Path, *, threshold: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(LAYERS):
        w = weights(seed=layer)
        encoder = {f"{name}_{layer}": w[name] for name in ("W_enc", "b_enc", "b_dec")}
        if threshold:
            encoder[f"threshold_{layer}"] = w["threshold"]
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        decoder = decoders(LAYERS - layer, seed=layer)
        save_file({f"W_dec_{layer}": decoder}, folder / f"W_dec_{layer}.safetensors")
    write_set_config(folder, "cross_layer_transcoder", {"feature_input_hook": "hook_resid_mid"})
    return folder


def write_llama_scope_transcoder(root: Path) -> Path:
    return write_llama_scope(
        root,
        hook_point_in="blocks.3.ln2.hook_normalized",
        hook_point_out="blocks.3.hook_mlp_out",
        dataset_average_activation_norm={"in": 3.5, "out": 0.6},
        sparsity_include_decoder_norm=True,
    )


def write_llama_scope_r1(root: Path, repository: str = "R1", **changes: Any) -> Path:
    folder = root / repository / "800M-Slimpajama-0-OpenR1-Math-220k" / "L3R"
    folder.mkdir(parents=True)
    threshold = {"log_jumprelu_threshold": (weights()["threshold"] + 0.1).log()}
    save_file(linear_tensors() | threshold, folder / "sae_weights.safetensors")
    point = "blocks.3.hook_resid_post"
    said = {
        "sae_type": "sae",
        "hook_point_in": point,
        "hook_point_out": point,
        "d_model": D_IN,
        "expansion_factor": D_SAE / D_IN,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
    }
    (folder / "config.json").write_text(json.dumps(said | changes))
    return folder


def write_llamascopium(folder: Path, *, norms: tuple[float, float], **changes: Any) -> Path:
    """A transcoder of Llama Scope 2."""
    folder.mkdir(parents=True)
    w = weights()
    reads, writes = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
    tensors = {
        "W_E": w["W_enc"].T.contiguous(),
        "W_D": w["W_dec"],
        "b_E": w["b_enc"],
        "b_D": w["b_dec"],
        f"dataset_average_activation_norm.{reads}": torch.tensor(norms[0]),
        f"dataset_average_activation_norm.{writes}": torch.tensor(norms[1]),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    said = {
        "sae_type": "transcoder",
        "hook_point_in": reads,
        "hook_point_out": writes,
        "act_fn": "topk",
        "top_k": 5,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
    }
    (folder / "config.json").write_text(json.dumps(said | changes))
    return folder


def write_attention_sae(root: Path, **changes: Any) -> Path:
    """One of Kissane and Krzyzanowski's."""
    path = root / "gpt2-small_L3_Hcat_z_lr1.20e-03_v9.pt"
    torch.save(sae_lens_tensors("standard"), path)
    said = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.3.attn.hook_z"}
    path.with_name(path.name.replace(".pt", "_cfg.json")).write_text(json.dumps(said | changes))
    return path


def write_qresearch(root: Path) -> Path:
    path = root / "DeepSeek-R1-Distill-Llama-8B-SAE-l3.pt"
    torch.save(linear_tensors(), path)
    return path
