"""Transcoders and cross-layer transcoders for engine tests, and what they do in transformers.

Nothing of this project is imported: files are written in circuit-tracer's layout, and the edits
are arithmetic of their own in hooks of a float32 model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

D_SAE = 96
ORDINARY_FROM = 4  # token ids below are special


@dataclass
class Dictionary:
    """What reads at one place of a layer and writes at others.

    Attributes:
        layer: where it reads.
        reads: kind of hook point.
        writes: kind of hook point, of ``layer`` and, if ``W_dec`` has more places, the next ones.
        W_enc: ``[d_sae, d_in]``.
        W_dec: ``[places, d_sae, d_out]``.
        threshold: of JumpReLU.
        k: of TopK.
        W_skip: ``[d_out, d_in]``.
        b_dec_to_input: whether b_dec is subtracted from what is read.
    """

    layer: int
    reads: str
    writes: str
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: float | None = None
    k: int | None = None
    W_skip: Tensor | None = None
    b_dec_to_input: bool = False

    def preactivation(self, x: Tensor) -> Tensor:
        """``[n, d_in]`` to ``[n, d_sae]``."""
        return (x - self.b_dec if self.b_dec_to_input else x) @ self.W_enc.T + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """``[n, d_in]`` to ``[n, d_sae]``."""
        p = self.preactivation(x)
        if self.k is not None:
            top = p.topk(self.k, dim=-1)
            return torch.zeros_like(p).scatter(-1, top.indices, top.values.relu())
        return torch.relu(p) * (p > (self.threshold or 0.0))

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """``[n, d_sae]`` and what was read to what a transcoder says is the output."""
        skipped = 0.0 if self.W_skip is None else x @ self.W_skip.T
        return f @ self.W_dec[0] + self.b_dec + skipped

    def nearest_jump(self, x: Tensor, features: Sequence[int] | None) -> float:
        """How near tokens come to where an activation of these features (None: of any) jumps."""
        p = self.preactivation(x)
        if self.k is not None:
            top = p.topk(self.k + 1, dim=-1).values
            return float((top[:, -2] - top[:, -1]).min())
        if self.threshold is None:
            return torch.inf
        jumps = (p - self.threshold).abs()
        return float((jumps if features is None else jumps[:, list(features)]).min())


def made(
    layer: int,
    reads: str,
    d: int,
    *,
    writes: str = "hook_mlp_out",
    places: int = 1,
    skip: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    threshold: float | None = None,
    k: int | None = None,
) -> Dictionary:
    """A random one; ``scale`` is what the stream's elements are where it reads."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    return Dictionary(
        layer,
        reads,
        writes,
        W_enc=nn.functional.normalize(normal(D_SAE, d), dim=1) / scale,
        W_dec=nn.functional.normalize(normal(places, D_SAE, d), dim=-1),
        b_enc=0.1 * normal(D_SAE),
        b_dec=0.1 * normal(d),
        threshold=threshold,
        k=k,
        W_skip=0.1 * normal(d, d) if skip else None,
    )


def write(folder: Path, dictionary: Dictionary) -> str:
    """Write it as circuit-tracer does; the source that opens it."""
    folder.mkdir(parents=True)
    one, layer = dictionary, dictionary.layer
    config: dict[str, Any] = {
        "model_name": "tiny",
        "model_kind": "transcoder_set",
        "feature_input_hook": one.reads,
        "feature_output_hook": one.writes,
    }
    tensors = {"W_enc": one.W_enc, "b_enc": one.b_enc, "b_dec": one.b_dec}
    if len(one.W_dec) > 1:
        config["model_kind"] = "cross_layer_transcoder"
        encoder = {f"{name}_{layer}": tensor for name, tensor in tensors.items()}
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        by_latent = one.W_dec.transpose(0, 1).contiguous()  # [d_sae, places, d]
        save_file({f"W_dec_{layer}": by_latent}, folder / f"W_dec_{layer}.safetensors")
    else:
        tensors["W_dec"] = one.W_dec[0]
        if one.threshold is not None:
            tensors["activation_function.threshold"] = torch.full((D_SAE,), one.threshold)
        if one.k is not None:
            config |= {"activation": "topk", "k": one.k}
        if one.W_skip is not None:
            tensors["W_skip"] = one.W_skip
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / f"layer_{layer}.safetensors",
        )
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return f"{folder},layer={layer}"


@dataclass
class EditedPass:
    """One sequence through a transformers model, edited as a ``steering`` field says.

    Attributes:
        dictionaries: by name.
        steering: the field: ``interventions`` with ``clamp``, ``scale`` and ``add``, one condition
            of scope token each, ``error_term`` and ``max_share``.
        ids: the tokens that enter the model.
        x: by dictionary, what it read, ``[n, d_in]``.
        f: by dictionary, its activations before the edits.
        edited: by edit, ``[n]`` bool.
        shares: by hook point, ``[n]``; NaN where nothing was edited.
    """

    dictionaries: Mapping[str, Dictionary]
    steering: Mapping[str, Any]
    ids: Sequence[int]
    x: dict[str, Tensor] = field(default_factory=dict)
    f: dict[str, Tensor] = field(default_factory=dict)
    edited: dict[int, Tensor] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)

    @torch.inference_mode()
    def logprobs(self, model: Any) -> Tensor:
        """``[n, vocab]`` of a float32 model."""
        layers = model.base_model.layers
        handles = [
            handle
            for index, layer in enumerate(layers)
            for handle in (*self._readers(index, layer), *self._writers(index, layer))
        ]
        try:
            logits: Tensor = model(torch.tensor([list(self.ids)])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits.log_softmax(-1)

    def nearest_jump(self) -> float:
        """How near anything came to where a rounding difference decides."""
        found = torch.inf
        for name, x in self.x.items():
            features = [e["feature"] for e in self._items(name)]
            features += [
                e["when"]["feature"]
                for e in self.steering["interventions"]
                if "when" in e and e["when"]["sae"] == name
            ]
            if features:
                every = None if not self.steering.get("error_term", True) else features
                found = min(found, self.dictionaries[name].nearest_jump(x[1:], every))
        return found

    def _items(self, name: str) -> list[dict[str, Any]]:
        return [item for item in self.steering["interventions"] if item["sae"] == name]

    def _readers(self, index: int, layer: Any) -> list[Any]:
        norm = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        of_norm = {"hook_resid_mid": _as_it_is, "ln2.hook_normalized": _without_gain(norm)}
        places = {
            "hook_resid_mid": norm,
            "ln2.hook_normalized": norm,
            "mlp.hook_in": layer.mlp,
            "attn.hook_z": layer.self_attn.o_proj,
        }
        found = []
        for name, one in self.dictionaries.items():
            if one.layer == index:
                prepared = of_norm.get(one.reads, _as_it_is)

                def read(_: Any, args: Any, name: str = name, how: Any = prepared) -> None:
                    x = how(args[0][0])
                    self.x[name], self.f[name] = x, self.dictionaries[name].encode(x)

                found.append(places[one.reads].register_forward_pre_hook(read))
        return found

    def _writers(self, index: int, layer: Any) -> list[Any]:
        outputs = {
            "hook_mlp_out": getattr(layer, "post_feedforward_layernorm", layer.mlp),
            "mlp.hook_out": layer.mlp,
        }

        def after(kind: str) -> Any:
            return lambda _, __, y: y + self._change(index, kind, y[0])[None]

        def before(_: Any, args: Any) -> Any:
            return (args[0] + self._change(index, "attn.hook_z", args[0][0])[None],)

        return [
            *(module.register_forward_hook(after(kind)) for kind, module in outputs.items()),
            layer.self_attn.o_proj.register_forward_pre_hook(before),
        ]

    def _change(self, layer: int, kind: str, y: Tensor) -> Tensor:
        total: Tensor = torch.zeros_like(y)
        touched = torch.zeros(len(y), dtype=torch.bool)
        for name, one in self.dictionaries.items():
            place = layer - one.layer
            if one.writes != kind or not 0 <= place < len(one.W_dec) or not self._items(name):
                continue
            f_new, where = self._edited_activations(name)
            if self.steering.get("error_term", True):
                delta = (f_new - self.f[name]) @ one.W_dec[place]
            else:
                delta = one.decode(f_new, self.x[name]) - y
            total = total + delta * where[:, None]
            touched |= where
        if not touched.any():
            return total
        share = total.norm(dim=-1) / y.norm(dim=-1)
        most: float = self.steering.get("max_share", torch.inf)
        kept: Tensor = (most / share).clamp(max=1.0).nan_to_num(1.0)
        total = total * kept[:, None]
        self.shares[f"blocks.{layer}.{kind}"] = share.clamp(max=most).masked_fill(
            ~touched, torch.nan
        )
        return total

    def _edited_activations(self, name: str) -> tuple[Tensor, Tensor]:
        f = self.f[name]
        f_new, touched = f.clone(), torch.zeros(len(f), dtype=torch.bool)
        ordinary = torch.tensor([t > 0 and i >= ORDINARY_FROM for t, i in enumerate(self.ids)])
        for i, item in enumerate(self.steering["interventions"]):
            if item["sae"] != name:
                continue
            where = ordinary.clone()
            if "when" in item:
                when = item["when"]
                where &= self.f[when["sae"]][:, when["feature"]] > when["above"]
            self.edited[i] = where
            touched |= where
            old, column = f[:, item["feature"]], item["feature"]
            new = {
                "clamp": torch.full_like(old, item["value"]),
                "scale": item["value"] * old,
                "add": old + item["value"],
            }[item["op"]]
            f_new[:, column] = torch.where(where, new, f_new[:, column])
        return f_new, touched


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _without_gain(norm: Any) -> Any:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return lambda x: x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
