"""Small SAEs written in the layouts of the published suites, for tests to load and to damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
