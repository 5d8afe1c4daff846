"""A LoRA adapter of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from tests.engine.reference import ReferenceModel

RANK: Final = 8


ALPHA: Final = 16


#: Of every layer: those of the hooked layer and of its branches too.
TARGETS: Final = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


HEAD: Final = "lm_head"


def make_adapter(model: ReferenceModel, folder: Path) -> Path:
    """Write a PEFT adapter of `TARGETS` and the head, and merge it into `model`."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    adapted = {
        f"model.layers.{i}.{target}": layer.get_submodule(target)
        for i, layer in enumerate(model.layers)
        for target in TARGETS
    }
    for name, module in {**adapted, HEAD: model.model.get_submodule(HEAD)}.items():
        A = 0.1 * torch.randn(RANK, module.weight.shape[1], generator=generator)
        B = 0.1 * torch.randn(module.weight.shape[0], RANK, generator=generator)
        prefix = f"base_model.model.{name}"
        tensors |= {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
        module.weight.data = module.weight.data + ALPHA / RANK * B @ A
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [*(target.split(".")[1] for target in TARGETS), HEAD],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
