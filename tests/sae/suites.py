"""Small SAEs written in the layouts of the published suites, for tests to load and to damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE = 12, 40
HOOK = "blocks.3.hook_resid_post"


def weights(seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, Tensor]:
    """Canonical random weights: matrices [d_sae, d_in], decoder rows of many different norms."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "W_enc": normal(d_sae, d_in),
        "W_dec": normal(d_sae, d_in) * torch.linspace(0.2, 3, d_sae).unsqueeze(1),
        "b_enc": normal(d_sae) * 0.5,
        "b_dec": normal(d_in),
        "threshold": normal(d_sae).abs(),
        "b_gate": normal(d_sae) * 0.5,
        "b_mag": normal(d_sae) * 0.5,
        "r_mag": normal(d_sae) * 0.3,
    }


def inputs(seed: int = 1, n: int = 9, d_in: int = D_IN) -> Tensor:
    """x [n, d_in]: rows of many different norms and means."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 20, n).unsqueeze(1)
    return torch.randn(n, d_in, generator=random) * scale + torch.randn(n, 1, generator=random)


SAE_LENS_VECTORS = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
}


def sae_lens_config(architecture: str = "jumprelu", **changes: Any) -> dict[str, Any]:
    """A configuration as SAELens 6 saves it."""
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": HOOK, "model_name": "tiny"},
    }
    if architecture in ("topk", "abstopk"):
        config |= {"k": 5, "rescale_acts_by_decoder_norm": False}
    return config | changes


def sae_lens_tensors(architecture: str = "jumprelu", seed: int = 0) -> dict[str, Tensor]:
    canonical = weights(seed)
    return {
        "W_enc": canonical["W_enc"].T.contiguous(),
        "W_dec": canonical["W_dec"],
        "b_dec": canonical["b_dec"],
        **{name: canonical[name] for name in SAE_LENS_VECTORS[architecture]},
    }


def write_sae_lens(
    folder: Path,
    architecture: str = "jumprelu",
    *,
    config: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = sae_lens_config(architecture) if config is None else config
    tensors = sae_lens_tensors(architecture) if tensors is None else tensors
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def write_gemma_scope(
    root: Path, *, upper: bool = False, compressed: bool = False, site: str = "res"
) -> Path:
    """A folder of `gemma-scope-2b-pt-res`, its keys as some of the releases spell them."""
    folder = root / f"gemma-scope-2b-pt-{site}" / "layer_3" / "width_16k" / "average_l0_20"
    folder.mkdir(parents=True)
    canonical = weights()
    arrays = {
        ("W_enc" if upper else "w_enc"): canonical["W_enc"].T.contiguous(),
        ("W_dec" if upper else "w_dec"): canonical["W_dec"],
        **{name: canonical[name] for name in ("b_enc", "b_dec", "threshold")},
    }
    save: Any = np.savez_compressed if compressed else np.savez
    save(folder / "params.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    return folder


def gemma_scope_2_config(**changes: Any) -> dict[str, Any]:
    return {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-270m",
        "hf_hook_point_in": "model.layers.3.output",
    } | changes


def gemma_scope_2_tensors(w_dec: Tensor) -> dict[str, Tensor]:
    canonical = weights()
    return {
        "w_enc": canonical["W_enc"].T.contiguous(),
        "w_dec": w_dec,
        **{name: canonical[name] for name in ("b_enc", "b_dec", "threshold")},
    }


def write_gemma_scope_2(
    root: Path, *, config: dict[str, Any] | None = None, site: str = "resid_post"
) -> Path:
    folder = root / "gemma-scope-2-270m-pt" / site / "layer_3_width_16k_l0_small"
    folder.mkdir(parents=True)
    save_file(gemma_scope_2_tensors(weights()["W_dec"]), folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def linear_tensors(
    encoder: str = "encoder", decoder: str = "decoder", canonical: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state of two `torch.nn.Linear` of these names."""
    canonical = weights() if canonical is None else canonical
    return {
        f"{encoder}.weight": canonical["W_enc"],
        f"{encoder}.bias": canonical["b_enc"],
        f"{decoder}.weight": canonical["W_dec"].T.contiguous(),
        f"{decoder}.bias": canonical["b_dec"],
    }


def write_llama_scope(root: Path, **changes: Any) -> Path:
    folder = root / "Llama3_1-8B-Base-L3R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    save_file(linear_tensors(), folder / "checkpoints" / "final.safetensors")
    config = {
        "hook_point_in": HOOK,
        "hook_point_out": HOOK,
        "d_model": D_IN,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.9,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 8.5, "out": 8.5},
        "top_k": 50,
    }
    (folder / "hyperparams.json").write_text(json.dumps(config | changes))
    return folder


def write_qwen_scope(root: Path, repository: str = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5") -> Path:
    folder = root / repository
    folder.mkdir(parents=True)
    canonical = weights()
    tensors = {
        "W_enc": canonical["W_enc"],
        "W_dec": canonical["W_dec"].T.contiguous(),
        "b_enc": canonical["b_enc"],
        "b_dec": canonical["b_dec"],
    }
    torch.save(tensors, folder / "layer3.sae.pt")
    return folder / "layer3.sae.pt"


def write_goodfire(root: Path, name: str = "Llama-3.1-8B-Instruct-SAE-l3.pth") -> Path:
    torch.save(linear_tensors("encoder_linear", "decoder_linear"), root / name)
    return root / name


def write_sparsify(root: Path, module: str = "layers.3", **changes: Any) -> Path:
    folder = root / module
    folder.mkdir(parents=True)
    canonical = weights()
    tensors = {
        "encoder.weight": canonical["W_enc"],
        "encoder.bias": canonical["b_enc"],
        "W_dec": canonical["W_dec"],
        "b_dec": canonical["b_dec"],
    }
    save_file(tensors, folder / "sae.safetensors")
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": 5,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_IN,
    }
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    return folder


DICTIONARY_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def dictionary_tensors(
    dict_class: str, canonical: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A state dictionary as that class of dictionary_learning saves it."""
    w = weights() if canonical is None else canonical
    linear = linear_tensors(canonical=w)
    del linear["decoder.bias"]
    parameters = {"W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"], "b_enc": w["b_enc"]}
    k = torch.tensor(5, dtype=torch.int)
    return {
        "AutoEncoder": {**linear, "bias": w["b_dec"]},
        "AutoEncoderNew": {**linear, "decoder.bias": w["b_dec"]},
        "GatedAutoEncoder": {
            "encoder.weight": w["W_enc"],
            "decoder.weight": w["W_dec"].T.contiguous(),
            "decoder_bias": w["b_dec"],
            "gate_bias": w["b_gate"],
            "mag_bias": w["b_mag"],
            "r_mag": w["r_mag"],
        },
        "AutoEncoderTopK": {
            **linear, "b_dec": w["b_dec"], "k": k, "threshold": torch.tensor(0.3),
        },
        "BatchTopKSAE": {
            **linear, "b_dec": w["b_dec"], "k": k, "threshold": torch.tensor(0.7),
        },
        "MatryoshkaBatchTopKSAE": {
            **parameters,
            "b_dec": w["b_dec"],
            "k": k,
            "threshold": torch.tensor(0.7),
            "group_sizes": torch.tensor([10, len(w["W_enc"]) - 10]),
        },
        "JumpReluAutoEncoder": {
            **parameters, "b_dec": w["b_dec"], "threshold": w["threshold"],
        },
    }[dict_class]  # fmt: skip


def write_dictionary_learning(
    root: Path,
    dict_class: str = "BatchTopKSAE",
    *,
    tensors: dict[str, Tensor] | None = None,
    trainer: dict[str, Any] | None = None,
    buffer: dict[str, Any] | None = None,
) -> Path:
    folder = root / "resid_post_layer_3" / "trainer_0"
    folder.mkdir(parents=True)
    torch.save(dictionary_tensors(dict_class) if tensors is None else tensors, folder / "ae.pt")
    config = {
        "trainer": {
            "dict_class": dict_class,
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "k": 5,
            "layer": 3,
            "lm_name": "tiny",
            "submodule_name": "resid_post_layer_3",
            "group_sizes": [10, 30],
        }
        | (trainer or {}),
        "buffer": {"d_submodule": D_IN, "io": "out", "ctx_len": 128} | (buffer or {}),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
