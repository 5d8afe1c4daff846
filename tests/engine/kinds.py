"""A model with a dictionary of every kind, and the model that they are held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engine.dictionaries import D_SAE, Dictionary, EditedPass, made, write
from tests.models import D_MODEL, NUM_LAYERS, VOCAB_SIZE, make_tiny_sae

NAMES: Final = ("relu_skip", "jump", "topk", "own", "clt", "z")


@dataclass
class Kinds:
    """Dictionaries of every kind, as files and as the reference has them.

    Attributes:
        checkpoint: the folder of the model.
        model: it, in transformers and float32.
        dictionaries: by name.
        sources: by name, what ``--sae NAME=`` takes.
    """

    checkpoint: Path
    model: Any
    dictionaries: dict[str, Dictionary]
    sources: dict[str, str]

    def run(self, field: dict[str, Any], ids: list[int]) -> tuple[EditedPass, Tensor]:
        """A pass over these tokens, and its log-probabilities ``[n, vocab]``."""
        edited = EditedPass(self.dictionaries, field, ids)
        return edited, edited.logprobs(self.model)

    @torch.inference_mode()
    def promoted(self, one: Dictionary, feature: int, count: int) -> list[int]:
        """The tokens that a decoder row promotes most, best first, by way of its branch's end."""
        layer = self.model.base_model.layers[one.layer]
        row = one.W_dec[:, feature].sum(dim=0)
        if one.writes == "attn.hook_z":
            row = layer.self_attn.o_proj(row)
        if hasattr(layer, "post_feedforward_layernorm"):  # Gemma's, with gains of 1 + weight
            behind = {
                "attn.hook_z": layer.post_attention_layernorm,
                "mlp.hook_out": layer.post_feedforward_layernorm,
            }.get(one.writes)
            row = row if behind is None else row * (1 + behind.weight)
        logits = self.model.get_output_embeddings()(self.model.base_model.norm(row))
        best: list[int] = logits.topk(count).indices.tolist()
        return best

    def firing(self, name: str, prompt: list[int]) -> int:
        """A feature that fires on some tokens of the prompt and not on all."""
        seen, _ = self.run({"interventions": []}, prompt)
        fires = (seen.f[name][1:] > 0).sum(dim=0)
        return int((fires * (len(prompt) - 1 - fires)).argmax())


def every_kind(tiny: Path, root: Path) -> Kinds:
    """Write a model like the tiny one at ``tiny``, and the dictionaries, into ``root``."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    _unlike_one(model)
    checkpoint = root / "model"
    model.save_pretrained(checkpoint)
    for file in tiny.glob("tokenizer*"):
        (checkpoint / file.name).write_bytes(file.read_bytes())
    dictionaries = _dictionaries(_scales(model))
    sources = {name: write(root / name, one) for name, one in dictionaries.items()}
    width = model.base_model.layers[2].self_attn.o_proj.in_features
    folder = make_tiny_sae(root / "z", layer=2, hook_kind="attn.hook_z", d_in=width, threshold=0.1)
    sources["z"] = str(folder)
    dictionaries["z"] = _of_heads(folder)
    return Kinds(checkpoint, model, dictionaries, sources)


def prompt(seed: int, length: int = 14) -> list[int]:
    """Random ordinary tokens."""
    rng = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(4, VOCAB_SIZE, (length,), generator=rng).tolist()
    return found


def edits(name: str, feature: int) -> list[dict[str, Any]]:
    """Three edits of one dictionary."""
    return [
        {"sae": name, "feature": feature, "op": "clamp", "value": 4.0},
        {"sae": name, "feature": (feature + 1) % D_SAE, "op": "add", "value": 2.0},
        {"sae": name, "feature": (feature + 2) % D_SAE, "op": "scale", "value": 3.0},
    ]


@torch.no_grad()
def _unlike_one(model: Any) -> None:
    """Gains of norms that no two places have in common: what was read before a gain shows."""
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter += 0.5 * torch.rand(parameter.shape, generator=rng)


def _scales(model: Any) -> dict[str, float]:
    """A typical element of the stream at each kind of place."""
    probes = {kind: made(1, kind, D_MODEL) for kind in ("hook_resid_mid", "mlp.hook_in")}
    seen = EditedPass(probes, {"interventions": []}, prompt(0))
    seen.logprobs(model)
    return {kind: float(x[1:].square().mean().sqrt()) for kind, x in seen.x.items()}


def _dictionaries(scale: dict[str, float]) -> dict[str, Dictionary]:
    return {
        "relu_skip": made(1, "mlp.hook_in", D_MODEL, skip=True, seed=1, scale=scale["mlp.hook_in"]),
        "jump": made(2, "ln2.hook_normalized", D_MODEL, seed=2, threshold=0.4),
        "topk": made(1, "hook_resid_mid", D_MODEL, seed=3, k=6, scale=scale["hook_resid_mid"]),
        "own": made(
            2, "mlp.hook_in", D_MODEL, writes="mlp.hook_out", seed=4, scale=scale["mlp.hook_in"]
        ),
        "clt": made(
            1, "hook_resid_mid", D_MODEL, places=NUM_LAYERS - 1, seed=5,
            scale=scale["hook_resid_mid"],
        ),
    }  # fmt: skip


def _of_heads(folder: Path) -> Dictionary:
    """An SAE in SAELens' layout."""
    w: dict[str, Tensor] = load_file(folder / "sae_weights.safetensors")
    return Dictionary(
        2, "attn.hook_z", "attn.hook_z", w["W_enc"].T, w["W_dec"][None], w["b_enc"], w["b_dec"],
        threshold=0.1, b_dec_to_input=True,
    )  # fmt: skip
