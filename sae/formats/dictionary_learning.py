"""dictionary_learning: `config.json` and `ae.pt`, or the same tensors in a safetensors file. Each
dictionary is of one of the library's classes.

`load_dictionary` of the library normalizes the decoder of an AutoEncoder, so its activations are
multiplied by the norm of their decoder row; those of the other classes are plain. BatchTopK and
Matryoshka SAEs apply their one threshold at inference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sae.card import HOOK_KINDS
from sae.errors import SAEError
from sae.formats.layout import Config, SAEFiles, SAELayout, Stored, linear_layers
from sae.formats.places import choose_hook
from sae.hook_names import UnknownHookError, parse_hook
from sae.source import ResolvedSAE

NAME = "dictionary_learning"

_LINEAR = linear_layers()
_PARAMETERS = {
    "W_enc": Stored("W_enc", transposed=True),
    "W_dec": Stored("W_dec"),
    "b_enc": Stored("b_enc"),
    "b_dec": Stored("b_dec"),
}
_ONE_THRESHOLD = {"threshold": Stored("threshold", scalar=True)}


@dataclass(frozen=True)
class _Class:
    """A class of the library: its architecture, its state dictionary, and its habits."""

    architecture: str
    tensors: Mapping[str, Stored]
    ignored: tuple[str, ...] = ()
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False


_CLASSES = {
    "AutoEncoder": _Class(
        "standard", {**_LINEAR, "b_dec": Stored("bias")}, rescale_acts_by_decoder_norm=True
    ),
    "AutoEncoderNew": _Class("standard", _LINEAR, apply_b_dec_to_input=False),
    "GatedAutoEncoder": _Class(
        "gated",
        {
            "W_enc": Stored("encoder.weight"),
            "W_dec": Stored("decoder.weight", transposed=True),
            "b_dec": Stored("decoder_bias"),
            "b_gate": Stored("gate_bias"),
            "b_mag": Stored("mag_bias"),
            "r_mag": Stored("r_mag"),
        },
    ),
    # The threshold that is saved with a top-k SAE is for uses of the library other than encode.
    "AutoEncoderTopK": _Class(
        "topk", {**_LINEAR, "b_dec": Stored("b_dec")}, ignored=("k", "threshold")
    ),
    "BatchTopKSAE": _Class(
        "jumprelu", {**_LINEAR, "b_dec": Stored("b_dec"), **_ONE_THRESHOLD}, ignored=("k",)
    ),
    "MatryoshkaBatchTopKSAE": _Class(
        "jumprelu", {**_PARAMETERS, **_ONE_THRESHOLD}, ignored=("k", "group_sizes")
    ),
    "JumpReluAutoEncoder": _Class(
        "jumprelu",
        {**_PARAMETERS, "threshold": Stored("threshold")},
        apply_b_dec_to_input=False,
    ),
}

# The library's own names for the places that it records, and those that its users give them.
_SUBMODULES = {
    "resid_post": "hook_resid_post",
    "resid": "hook_resid_post",
    "residual": "hook_resid_post",
    "resid_mid": "hook_resid_mid",
    "resid_pre": "hook_resid_pre",
    "mlp_out": "mlp.hook_out",
    "mlp": "mlp.hook_out",
    "attn_out": "attn.hook_out",
    "attn": "attn.hook_out",
    "attention": "attn.hook_out",
    "attention_out": "attn.hook_out",
    "self_attn": "attn.hook_out",
}
_SUBMODULE = re.compile(
    rf"(?P<place>{'|'.join(_SUBMODULES)})(?:(?:_layer)?_?(?P<layer>\d{{1,5}}))?"
)
_DIGITS = re.compile(r"\d{1,5}", re.ASCII)
# The hook point at each side of a module. An SAE of a branch's input is refused further on.
_SIDES = {
    **{(kind, "out"): kind for kind in HOOK_KINDS},
    ("hook_resid_pre", "in"): "hook_resid_pre",
    ("hook_resid_post", "in"): "hook_resid_pre",
    ("mlp.hook_out", "in"): "mlp.hook_in",
    ("attn.hook_out", "in"): "attn.hook_in",
}


def matches(files: SAEFiles) -> bool:
    config = files.configs.get("config.json")
    described = config is not None and isinstance(config.get("trainer"), dict)
    if files.tensors.container == "safetensors":
        return described and "cfg.json" not in files.configs
    if files.tensors.container != "torch":
        return False
    named = bool({"encoder.weight", "decoder.weight"} & files.names) or (
        {"W_enc", "threshold"} <= files.names
    )
    return described or named


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    config = files.config("config.json")
    trainer = config.section("trainer")
    name = trainer.text("dict_class")
    if name not in _CLASSES:
        raise SAEError(
            f"{config.path}: unknown architecture (dict_class {name!r:.60}), expected one of "
            f"{', '.join(_CLASSES)}"
        )
    kind = _CLASSES[name]
    return SAELayout(
        format=NAME,
        architecture=kind.architecture,
        hook=choose_hook(config.path, ref, _stated_hook(config, trainer), guessed=None),
        d_in=trainer.count("activation_dim"),
        d_sae=trainer.count("dict_size"),
        tensors=kind.tensors,
        k=_k(files, trainer) if kind.architecture == "topk" else None,
        apply_b_dec_to_input=kind.apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=kind.rescale_acts_by_decoder_norm,
        ignored=kind.ignored,
    )


def _stated_hook(config: Config, trainer: Config) -> str | None:
    """By the layer, the submodule's name (`resid_post_layer_8`) and the side that was recorded.

    What is not understood is returned in words, and `hook=` then decides.
    """
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name", "")
    side = config.section("buffer").get("io", "out")
    if side == "in_and_out":
        raise SAEError(
            f"{config.path}: this is a transcoder (its buffer recorded in_and_out), for which "
            "dictionary_learning has no format of its own"
        )
    if not submodule and layer is None:
        return None
    number = _layer_number(layer)
    said = f"{submodule or 'resid_post'!s:.80} of layer {layer!s:.40}, side {side!s:.40}"
    if not isinstance(submodule, str) or (number is None and layer is not None):
        return said
    try:
        kind, named_layer = _place(submodule or "resid_post")
    except SAEError:  # a place at which nothing is served
        return submodule
    if kind is None or not isinstance(side, str) or (kind, side) not in _SIDES:
        return said
    if number is not None and named_layer not in (None, number):
        return f"{said}, whose name says layer {named_layer}"
    found = named_layer if number is None else number
    return said if found is None else f"blocks.{found}.{_SIDES[kind, side]}"


def _layer_number(layer: object) -> int | None:
    """An index from 0, as a number or in digits; None for anything else."""
    if isinstance(layer, str) and _DIGITS.fullmatch(layer):
        return int(layer)
    if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0:
        return layer
    return None


def _place(submodule: str) -> tuple[str | None, int | None]:
    """The kind of hook point that a submodule's name means, and the layer if it says one."""
    if match := _SUBMODULE.fullmatch(submodule):
        return _SUBMODULES[match["place"]], None if match["layer"] is None else int(match["layer"])
    try:
        hook = parse_hook(submodule)
    except UnknownHookError:
        return None, None
    return hook.kind, hook.layer


def _k(files: SAEFiles, trainer: Config) -> int:
    """The configuration's k; as in the library, one that contradicts the weights' is refused."""
    k = trainer.count("k")
    if "k" in files.names and files.shape("k", rank=0) == ():
        stored = files.tensors.tensor("k").item()
        if stored != k:
            raise SAEError(f"{files.path}: k is {stored}, {trainer.path.name} says {k}")
    return k
