"""An independent reference: transformers in float32 with hooks, and arithmetic of its own.

Nothing of this project is imported. A request's tokens are run through the model in one pass with
every edit applied at its positions; causality makes that the same as step by step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engine.reference_pass import ReferencePass


class ReferenceSAE:
    """A SAELens folder, read and computed as its documentation says."""

    def __init__(self, folder: Path, sink_norm: float | None = None) -> None:
        self.config = json.loads((folder / "cfg.json").read_text())
        self.weights = {
            k: v.float() for k, v in load_file(folder / "sae_weights.safetensors").items()
        }
        self.hook: str = self.config.get("metadata", self.config)["hook_name"]
        _, layer, self.kind = self.hook.split(".", 2)
        self.layer = int(layer)
        self.sink_norm = sink_norm
        self.max_activation: dict[int, float] = {}
        if (features := folder / "features.jsonl").exists():
            entries = [json.loads(line) for line in features.read_text().splitlines()]
            self.max_activation = {
                e["index"]: e["max_activation"] for e in entries if e.get("max_activation")
            }

    @property
    def threshold(self) -> Tensor:
        """``[d_sae]``, below which a latent is silent."""
        bias = self.weights["b_enc"]
        return self.weights.get("threshold", torch.zeros_like(bias))

    def preactivation(self, x: Tensor) -> Tensor:
        """``[n, d_in]`` to ``[n, d_sae]``, of what has a plain encoder."""
        return self._input(x) @ self.weights["W_enc"] + self.weights["b_enc"]

    def distance_to_bound(self, x: Tensor, feature: int, bound: float) -> Tensor:
        """`[n, d_in]` to `[n]`: how far each token is from where f > bound changes."""
        if self.config["architecture"] in ("standard", "jumprelu"):
            p = self.preactivation(x)[:, feature]
            return (p - max(bound, float(self.threshold[feature]))).abs()
        f = self.encode(x)[:, feature]
        from_bound = (f - bound).abs().masked_fill(f == 0, torch.inf)
        return torch.minimum(self.distance_to_jump(x, [feature]), from_bound)

    def encode(self, x: Tensor) -> Tensor:
        """``[n, d_in]`` to ``[n, d_sae]``."""
        w = self.weights
        x = self._input(x)
        if self.config["architecture"] == "gated":
            gate = x @ w["W_enc"] + w["b_gate"] > 0
            return gate * torch.relu(x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
        h = x @ w["W_enc"] + w["b_enc"]
        if self.config["architecture"] == "jumprelu":
            return torch.relu(h) * (h > w["threshold"])
        if self.config["architecture"] == "topk":
            top = h.topk(self.config["k"], dim=-1)
            return torch.zeros_like(h).scatter(-1, top.indices, top.values.relu())
        return torch.relu(h)

    def distance_to_jump(self, x: Tensor, features: Sequence[int] | None) -> Tensor:
        """`[n, d_in]` to `[n]`: how far each token is from where an activation of these features
        (None: of any) jumps, or from being a sink."""
        w, architecture = self.weights, self.config["architecture"]
        distance = torch.full((len(x),), torch.inf)
        if self.sink_norm is not None:
            distance = (x.norm(dim=-1) - self.sink_norm).abs()
        if architecture == "standard":
            return distance
        bias = w["b_gate"] if architecture == "gated" else w["b_enc"]
        h = self._input(x) @ w["W_enc"] + bias
        if architecture == "topk":
            top = h.topk(self.config["k"] + 1, dim=-1).values
            return torch.minimum(distance, top[:, -2] - top[:, -1])
        jumps = (h - w["threshold"] if architecture == "jumprelu" else h).abs()
        if features is not None:
            jumps = jumps[:, list(features)]
        return torch.minimum(distance, jumps.amin(-1))

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """``[n, d_sae]`` to ``[n, d_in]``."""
        _, mu, sigma = self._normed(x)
        return (f @ self.weights["W_dec"] + self.weights["b_dec"]) * sigma + mu

    def output_scale(self, x: Tensor) -> Tensor:
        """``[n, 1]``: what one unit of a decoded feature is in the stream."""
        return self._normed(x)[2]

    def _input(self, x: Tensor) -> Tensor:
        x = self._normed(x)[0]
        return x - self.weights["b_dec"] if self.config["apply_b_dec_to_input"] else x

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kind = self.config["normalize_activations"]
        one, zero = torch.ones(x.shape[0], 1), torch.zeros(x.shape[0], 1)
        if kind == "layer_norm":
            mu = x.mean(-1, keepdim=True)
            sigma = (x - mu).std(-1, keepdim=True)
            return (x - mu) / (sigma + 1e-5), mu, sigma
        if kind == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[1] ** 0.5
            return x / scale, zero, scale
        return x, zero, one


class ReferenceModel:
    """A transformers model whose stream can be edited.

    Args:
        folder: the checkpoint.
        special_token_ids: tokens that edits leave alone.
        places: by kind of hook point, a module below the layer and whether its output is meant, or
            else its input; kinds that are left out are where most families have them.
    """

    def __init__(
        self,
        folder: Path,
        special_token_ids: Sequence[int],
        places: Mapping[str, tuple[str, bool]] | None = None,
    ) -> None:
        import transformers

        (architecture,) = transformers.AutoConfig.from_pretrained(folder).architectures
        self.model = (
            getattr(transformers, architecture)
            .from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            .eval()
        )
        self.special = set(special_token_ids)
        self.places = places or {}
        # An engine of vLLM's backend for transformers changes the class that they share.
        inner, cls = self.model.base_model, type(self.model.base_model)
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        inner.__class__ = type(cls.__name__, cls.__bases__, own)
        inner = getattr(inner, "language_model", inner)
        self.layers = inner.layers if hasattr(inner, "layers") else inner.h

    @torch.inference_mode()
    def logprobs(
        self,
        prompt: Sequence[int],
        generated: Sequence[int],
        saes: Mapping[str, ReferenceSAE],
        field: Mapping[str, Any] | None,
        seen: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Log-probabilities ``[len(generated), vocab]`` before each generated token.

        ``seen`` receives, by SAE, the stream ``[n, d_in]`` before the edits.
        """
        logprobs = self.trace(prompt, generated, saes, field, seen)[0]
        return logprobs

    @torch.inference_mode()
    def trace(
        self,
        prompt: Sequence[int],
        generated: Sequence[int],
        saes: Mapping[str, ReferenceSAE],
        field: Mapping[str, Any] | None,
        seen: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, ReferencePass]:
        """As `logprobs`, and what the edits did."""
        ids = [*prompt, *generated][:-1]
        where = (saes, dict(field or {}))
        alone = ReferencePass(*where, list(prompt), len(prompt), self.special)
        if _looks_at_the_prompt(field):
            self._run(alone)
        made = ReferencePass(*where, ids, len(prompt), self.special, alone)
        logits = self._run(made)
        made.nearest = min(made.nearest, alone.nearest)
        if seen is not None:
            seen.update(made.seen)
        return logits[len(prompt) - 1 :].log_softmax(-1), made

    def _run(self, made: ReferencePass) -> Tensor:
        """Logits ``[n, vocab]``."""
        together: dict[str, list[str]] = {}
        for name, sae in made.saes.items():
            together.setdefault(sae.hook, []).append(name)
        handles = [self._hook(names, made) for names in together.values()]
        try:
            logits: Tensor = self.model(torch.tensor([list(made.ids)])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits

    def _hook(self, names: Sequence[str], made: ReferencePass) -> Any:
        sae = made.saes[names[0]]

        def edit(stream: Tensor) -> Tensor:
            return stream + made.change(names, stream[0].clone())[None]

        layer = self.layers[sae.layer]
        if sae.kind == "hook_resid_pre":

            def before(_: Any, args: Any, kwargs: Any) -> Any:
                if args:
                    return (edit(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

            return layer.register_forward_pre_hook(before, with_kwargs=True)
        if sae.kind in self.places and not self.places[sae.kind][1]:

            def within(_: Any, args: Any, kwargs: Any) -> None:
                # In place: what is given to the module is also what is added to its output.
                stream = args[0] if args else kwargs["hidden_states"]
                stream.copy_(edit(stream))

            reader = layer.get_submodule(self.places[sae.kind][0])
            return reader.register_forward_pre_hook(within, with_kwargs=True)
        if sae.kind in self.places:
            layer = layer.get_submodule(self.places[sae.kind][0])
        elif sae.kind == "hook_mlp_out":
            layer = getattr(layer, "post_feedforward_layernorm", layer.mlp)
        elif sae.kind == "hook_attn_out":
            sandwich = hasattr(layer, "pre_feedforward_layernorm")
            attention = layer.attn if hasattr(layer, "attn") else layer.self_attn
            layer = layer.post_attention_layernorm if sandwich else attention

        def after(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        return layer.register_forward_hook(after)


def _looks_at_the_prompt(field: Mapping[str, Any] | None) -> bool:
    return '"scope": "prompt"' in json.dumps(field)


def margin(
    saes: Mapping[str, ReferenceSAE],
    seen: Mapping[str, Tensor],
    field: Mapping[str, Any] | None,
    first: int = 0,
) -> float:
    """How near the streams (``seen``, from token ``first`` on) come to where an edit jumps.

    A rounding difference becomes a whole activation there: two right implementations may differ.
    """
    least = torch.inf
    for name, x in seen.items():
        edited = [
            edit["feature"]
            for edit in (field or {}).get("interventions", [])
            if edit.get("sae", name) == name
        ]
        if edited:
            whole = not (field or {}).get("error_term", True)
            distance = saes[name].distance_to_jump(x[first:], None if whole else edited)
            least = min(least, float(distance.min()))
    return least


def behind_best(logprobs: Tensor, tokens: Sequence[int]) -> float:
    """By how many nats the tokens fall short of the likeliest, at most; 0 where all are greedy."""
    chosen = logprobs[range(len(tokens)), tokens]
    return float((logprobs.amax(-1) - chosen).max())
