"""circuit-tracer's sets of transcoders, described by a `config.yaml`, with one row a latent.

* `layer_L.safetensors`, one transcoder per layer: W_enc, W_dec [d_sae, d], b_enc, b_dec, perhaps
  W_skip [d, d] and activation_function.threshold. Without a threshold it is a ReLU, or a TopK if
  `activation` says so.
* `W_enc_L.safetensors` and `W_dec_L.safetensors`, a cross-layer transcoder: W_enc_L, b_enc_L,
  b_dec_L, perhaps threshold_L, and W_dec_L [d_sae, layers - L, d]: what is written at layers L and
  above.

b_dec is not subtracted from the input. circuit-tracer's TopK keeps negative values among the k
largest, which are 0 here; the two differ only if fewer than k latents are positive.
"""

from __future__ import annotations

import re

from sae.card import KIND_CLT, KIND_TRANSCODER, HookPoint
from sae.errors import SAEError
from sae.files import CLT_ENCODER, SET_CONFIG, numbered_layer
from sae.formats.layout import Config, SAEFiles, SAELayout, Stored
from sae.formats.places import choose_places
from sae.source import ResolvedSAE

NAME = "circuit_tracer"

_THRESHOLD = "activation_function.threshold"
_LAYER_FILE = re.compile(r"layer_\d+\.safetensors")
_INPUT, _OUTPUT = "feature_input_hook", "feature_output_hook"
# The set of Qwen3 14B lacks the configuration that those of the other sizes have.
_QWEN3 = re.compile(r"(qwen3-[\d.]+b-transcoders)")
_QWEN3_HOOKS = ("mlp.hook_in", "hook_mlp_out")
_ACTIVATION_KEYS = ("activation", "activation_fn", "activation_function")


def matches(files: SAEFiles) -> bool:
    if files.tensors.container != "safetensors":
        return False
    if CLT_ENCODER.fullmatch(files.path.name):
        return True
    if not {"W_enc", "W_dec"} <= files.names or "cfg.json" in files.configs:
        return False
    shapes = {files.tensors.headers[name].shape for name in ("W_enc", "W_dec")}
    described = _INPUT in files.configs.get(SET_CONFIG, Config(files.path, {}))
    named = _LAYER_FILE.fullmatch(files.path.name) is not None
    alike = len(shapes) == 1 and not files.configs
    return described or named or alike or _THRESHOLD in files.names


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    layer = numbered_layer(files.path.name)
    if CLT_ENCODER.fullmatch(files.path.name):
        assert layer is not None
        return _cross_layer(files, ref, layer)
    reads, hook = _places(files, ref, layer)
    d_sae, d_in = files.shape("W_enc", rank=2)
    architecture, k = _activation(files)
    optional = {"threshold": Stored(_THRESHOLD)} if architecture == "jumprelu" else {}
    if "W_skip" in files.names:
        optional["W_skip"] = Stored("W_skip")
    return SAELayout(
        format=NAME,
        architecture=architecture,
        kind=KIND_TRANSCODER,
        hook=hook,
        reads=reads,
        d_in=d_in,
        d_out=files.shape("W_dec", rank=2)[1],
        d_sae=d_sae,
        tensors={name: Stored(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")} | optional,
        k=k,
        apply_b_dec_to_input=False,
        ignored=("k",) if architecture == "topk" else (),
    )


def _cross_layer(files: SAEFiles, ref: ResolvedSAE, layer: int) -> SAELayout:
    reads, hook = _places(files, ref, layer)
    d_sae, d_in = files.shape(f"W_enc_{layer}", rank=2)
    _, places, d_out = files.shape(f"W_dec_{layer}", rank=3)
    if reads.layer != layer or hook.layer != layer:
        raise SAEError(
            f"{files.path}: it belongs to layer {layer}, but reads= and writes= are {reads} and "
            f"{hook}"
        )
    architecture, k = _activation(files, f"threshold_{layer}")
    if k is not None:
        raise SAEError(
            f"{files.path}: this is a cross-layer transcoder that chooses its top k, and nothing "
            "says whether of each layer or of all together; it cannot be served"
        )
    optional = ["threshold"] if architecture == "jumprelu" else []
    return SAELayout(
        format=NAME,
        architecture=architecture,
        kind=KIND_CLT,
        hook=hook,
        reads=reads,
        writes=tuple(HookPoint(layer + place, hook.kind) for place in range(places)),
        d_in=d_in,
        d_out=d_out,
        d_sae=d_sae,
        tensors={
            name: Stored(f"{name}_{layer}") for name in ("W_enc", "W_dec", "b_enc", *optional)
        },
        constants={"b_dec": 0.0},
        apply_b_dec_to_input=False,
        stored_places=places,
        ignored=(f"b_dec_{layer}", f"W_skip_{layer}"),
    )


def _places(files: SAEFiles, ref: ResolvedSAE, layer: int | None) -> tuple[HookPoint, HookPoint]:
    config = files.configs.get(SET_CONFIG)
    if config is not None and _INPUT in config and layer is not None:
        hooks = [f"blocks.{layer}.{config.text(key)}" for key in (_INPUT, _OUTPUT)]
        return choose_places(config.path, ref, *hooks)
    known = files.search(ref, _QWEN3) is not None and layer is not None
    guessed = [f"blocks.{layer}.{kind}" if known else None for kind in _QWEN3_HOOKS]
    return choose_places(files.path, ref, *guessed, guessed=True)


def _activation(files: SAEFiles, threshold: str = _THRESHOLD) -> tuple[str, int | None]:
    """The architecture, and k of a TopK; `threshold` is the tensor of a JumpReLU."""
    config = files.configs.get(SET_CONFIG, Config(files.path, {}))
    stated = next((config.text(key).lower() for key in _ACTIVATION_KEYS if key in config), None)
    if threshold in files.names:
        return "jumprelu", None
    if stated in ("topk", "top_k") or "k" in files.names or "k" in config:
        return "topk", _k(files, config)
    if stated not in (None, "relu"):
        raise SAEError(
            f"{config.path}: unknown activation {stated!r:.60}, expected relu, topk or jumprelu "
            f"with {threshold} in {files.path.name}"
        )
    return "standard", None


def _k(files: SAEFiles, config: Config) -> int:
    if "k" in config or "k" not in files.names:
        return config.count("k")
    files.shape("k", rank=0)
    k = int(files.tensors.tensor("k"))
    if k < 1:
        raise SAEError(f"{files.path}: k is {k}, expected at least 1")
    return k
