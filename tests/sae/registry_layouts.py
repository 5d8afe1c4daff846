"""The files of an entry of SAELens' registry, tiny, as the entry's loader reads them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from sae.registry import RegistryEntry
from tests.sae import suites
from tests.sae.suites import dictionary_tensors, linear_tensors

D_IN: Final = 6
#: The largest k is 100.
D_SAE: Final = 112
#: Of the layers that a cross-layer transcoder writes at.
LAYERS: Final = 26

_HOOK = re.compile(r"blocks\.\d+\.(?:hook_(?:resid|mlp|attn)_(?:pre|mid|post|out)|hook_z)")
_SITES = {"R": "hook_resid_post", "M": "hook_mlp_out", "A": "hook_attn_out"}


class Layouts:
    """A folder that stands for the hub: repositories below it by owner and name.

    One weight file of each layout is written; the entries' are links to it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._templates: dict[str, Path] = {}
        self._writers: dict[str, Callable[[Path, RegistryEntry], Path]] = {
            "sae_lens": self._sae_lens,
            "gemma_2": self._npz,
            "gemma_2_transcoder": self._npz,
            "gemma_3": self._gemma_3,
            "llama_scope": self._llama_scope,
            "llama_scope_r1_distill": self._llama_scope_r1,
            "dictionary_learning_1": self._dictionary_learning,
            "mwhanna_transcoder": self._circuit_tracer,
            "mntss_clt_layer_transcoder": self._clt,
            "connor_rob_hook_z": self._attention_sae,
            "goodfire": self._goodfire,
            "deepseek_r1": self._linear,
            "qwen_scope": self._qwen_scope,
        }

    def write(self, loader: str, entry: RegistryEntry) -> Path:
        """Write the entry's files and return the path that a source of it leads to."""
        place = self.root / entry.repo / entry.path
        place.parent.mkdir(parents=True, exist_ok=True)
        return self._writers[loader](place, entry)

    def _link(self, name: str, save: Callable[[Path], Any], to: Path) -> None:
        """Link ``to`` to the template of that name, made by ``save`` when it is first used."""
        template = self._templates.get(name)
        if template is None:
            template = self.root / f"template-{len(self._templates)}{to.suffix}"
            save(template)
            self._templates[name] = template
        to.parent.mkdir(parents=True, exist_ok=True)
        if not to.exists():
            os.link(template, to)

    def _sae_lens(self, place: Path, entry: RegistryEntry) -> Path:
        hook = _HOOK.search(f"{entry.sae_id} {entry.path}")
        assert hook is not None, entry
        w = weights()
        tensors = {"W_enc": w["W_enc"].T, **{n: w[n] for n in ("W_dec", "b_enc", "b_dec")}}
        self._link("sae_lens", lambda to: _save(tensors, to), place / "sae_weights.safetensors")
        scaled = entry.facts.norm_scaling_factor is not None
        config = {
            "hook_name": hook[0],
            "d_in": D_IN,
            "d_sae": D_SAE,
            "dtype": "float32",
            "device": "cpu",
            "model_name": entry.facts.model,
            "normalize_activations": "expected_average_only_in" if scaled else "none",
        }
        (place / "cfg.json").write_text(json.dumps(config))
        return place

    def _npz(self, place: Path, entry: RegistryEntry) -> Path:
        save: Any = np.savez  # its stubs take arrays' names for options
        arrays = {name: tensor.numpy() for name, tensor in _gemma("W_enc", "W_dec").items()}
        self._link("npz", lambda to: save(to, **arrays), place / "params.npz")
        return place

    def _gemma_3(self, place: Path, entry: RegistryEntry) -> Path:
        affine = "affine" in entry.path
        tensors = _gemma("w_enc", "w_dec")
        if affine:
            tensors["affine_skip_connection"] = _skip().T
        self._link(f"gemma_3 {affine}", lambda to: _save(tensors, to), place / "params.safetensors")
        return place

    def _llama_scope(self, place: Path, entry: RegistryEntry) -> Path:
        name = re.search(r"L(\d+)([RMA])-", entry.path)
        assert name is not None, entry
        hook = f"blocks.{name[1]}.{_SITES[name[2]]}"
        self._link(
            "linear",
            lambda to: _save(linear_tensors(canonical=weights()), to),
            place / "checkpoints" / "final.safetensors",
        )
        factor = entry.facts.norm_scaling_factor
        assert factor is not None
        config = {
            "hook_point_in": hook,
            "hook_point_out": hook,
            "d_model": D_IN,
            "d_sae": D_SAE,
            "act_fn": "jumprelu",
            "jump_relu_threshold": 0.5,
            "norm_activation": "dataset-wise",
            "sparsity_include_decoder_norm": True,
            "dataset_average_activation_norm": {side: math.sqrt(D_IN) / factor for side in _SIDES},
        }
        (place / "hyperparams.json").write_text(json.dumps(config))
        return place

    def _llama_scope_r1(self, place: Path, entry: RegistryEntry) -> Path:
        tensors = linear_tensors(canonical=weights()) | {
            "log_jumprelu_threshold": weights()["threshold"].log()
        }
        self._link("r1", lambda to: _save(tensors, to), place / "sae_weights.safetensors")
        layer = re.search(r"L(\d+)R", entry.path)
        assert layer is not None, entry
        hook = f"blocks.{layer[1]}.hook_resid_post"
        config = {
            "hook_point_in": hook,
            "hook_point_out": hook,
            "d_model": D_IN,
            "expansion_factor": D_SAE / D_IN,
            "act_fn": "jumprelu",
            "norm_activation": "dataset-wise",
            "sparsity_include_decoder_norm": True,
        }
        (place / "config.json").write_text(json.dumps(config))
        return place

    def _dictionary_learning(self, place: Path, entry: RegistryEntry) -> Path:
        kind = _dictionary_class(entry.path)
        self._link(
            kind,
            lambda to: torch.save(dictionary_tensors(kind, weights()), to),
            place / "ae.pt",
        )
        layer = re.search(r"resid_post_layer_(\d+)", entry.path)
        assert layer is not None, entry
        trainer = {
            "dict_class": kind,
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "k": 5,
            "layer": int(layer[1]),
            "lm_name": entry.facts.model,
            "submodule_name": f"resid_post_layer_{layer[1]}",
        }
        config = {"trainer": trainer, "buffer": {"d_submodule": D_IN, "io": "out", "ctx_len": 128}}
        (place / "config.json").write_text(json.dumps(config))
        return place

    def _circuit_tracer(self, place: Path, entry: RegistryEntry) -> Path:
        tensors = {name: weights()[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        self._link("plt", lambda to: _save(tensors, to), place)
        values = {"d_model": D_IN, "d_feature": D_SAE, "batch_size": 128}
        said = {key: {"value": value} for key, value in values.items()}
        (place.parent / "wandb-config.yaml").write_text(yaml.safe_dump(said))
        # Qwen3 14B's sets have none.
        if "14b" not in entry.repo:
            _set_config(place.parent, "mlp.hook_in")
        return place

    def _clt(self, place: Path, entry: RegistryEntry) -> Path:
        layer = int(re.findall(r"\d+", entry.path)[0])
        w = weights()
        encoder = {f"{name}_{layer}": w[name] for name in ("W_enc", "b_enc", "b_dec")}
        self._link(f"clt {layer}", lambda to: _save(encoder, to), place)
        decoder = {f"W_dec_{layer}": w["W_dec"][:, None].expand(-1, LAYERS - layer, -1)}
        beside = place.with_name(f"W_dec_{layer}.safetensors")
        self._link(f"clt decoder {layer}", lambda to: _save(decoder, to), beside)
        _set_config(place.parent, "hook_resid_mid")
        return place

    def _attention_sae(self, place: Path, entry: RegistryEntry) -> Path:
        w = weights()
        tensors = {"W_enc": w["W_enc"].T, **{n: w[n] for n in ("W_dec", "b_enc", "b_dec")}}
        self._link("heads", lambda to: torch.save(tensors, to), place)
        layer = re.search(r"_L(\d+)_", entry.path)
        assert layer is not None
        config = {
            "act_size": D_IN, "dict_size": D_SAE, "act_name": f"blocks.{layer[1]}.attn.hook_z",
        }  # fmt: skip
        place.with_name(f"{place.name.removesuffix('.pt')}_cfg.json").write_text(json.dumps(config))
        return place

    def _goodfire(self, place: Path, entry: RegistryEntry) -> Path:
        tensors = linear_tensors("encoder_linear", "decoder_linear", weights())
        self._link("goodfire", lambda to: torch.save(tensors, to), place)
        return place

    def _linear(self, place: Path, entry: RegistryEntry) -> Path:
        self._link(
            "qresearch", lambda to: torch.save(linear_tensors(canonical=weights()), to), place
        )
        return place

    def _qwen_scope(self, place: Path, entry: RegistryEntry) -> Path:
        w = weights()
        tensors = {
            "W_enc": w["W_enc"],
            "W_dec": w["W_dec"].T,
            "b_enc": w["b_enc"],
            "b_dec": w["b_dec"],
        }
        self._link("qwen", lambda to: torch.save(tensors, to), place)
        return place


_SIDES = ("in", "out")


def weights() -> dict[str, Tensor]:
    """Random weights, matrices [d_sae, d_in], decoder rows of norm 1."""
    w = suites.weights(d_in=D_IN, d_sae=D_SAE)
    w["W_dec"] = nn.functional.normalize(w["W_dec"], dim=1)
    # Its logarithm is stored, too.
    w["threshold"] += 0.1
    return w


def _save(tensors: dict[str, Tensor], to: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to)


def _skip() -> Tensor:
    return torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(9)) / 4


def _gemma(encoder: str, decoder: str) -> dict[str, Tensor]:
    w = weights()
    rest = {name: w[name] for name in ("b_enc", "b_dec", "threshold")}
    return {encoder: w["W_enc"].T.contiguous(), decoder: w["W_dec"], **rest}


def _set_config(folder: Path, reads: str) -> None:
    said = {"model_name": "x", "feature_input_hook": reads, "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump(said))


def _dictionary_class(path: str) -> str:
    name = path.lower()
    if "matryoshka" in name:
        return "MatryoshkaBatchTopKSAE"
    if "batchtopk" in name or name.startswith("resid_post"):
        return "BatchTopKSAE"
    if "topk" in name:
        return "AutoEncoderTopK"
    if "gated" in name:
        return "GatedAutoEncoder"
    return "JumpReluAutoEncoder" if "jumprelu" in name else "AutoEncoder"
