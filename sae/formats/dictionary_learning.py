"""dictionary_learning: `config.json` and `ae.pt`, one class of the library each.

`load_dictionary` of the library normalises the decoder of an AutoEncoder, so its activations are
times the norm of their decoder row; those of the other classes are plain. BatchTopK and Matryoshka
SAEs apply their one threshold at inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sae.errors import SAEError
from sae.formats.layout import Config, SAEFiles, SAELayout, Stored, choose_hook, refuse_transcoder
from sae.source import SAEReference

NAME = "dictionary_learning"

_LINEAR = {
    "W_enc": Stored("encoder.weight"),
    "W_dec": Stored("decoder.weight", transposed=True),
    "b_enc": Stored("encoder.bias"),
}
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
    "AutoEncoderNew": _Class(
        "standard", {**_LINEAR, "b_dec": Stored("decoder.bias")}, apply_b_dec_to_input=False
    ),
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


def matches(files: SAEFiles) -> bool:
    if files.tensors.container != "torch":
        return False
    config = files.configs.get("config.json")
    described = config is not None and isinstance(config.get("trainer"), dict)
    named = bool({"encoder.weight", "decoder.weight"} & files.names) or (
        {"W_enc", "threshold"} <= files.names
    )
    return described or named


def read(files: SAEFiles, ref: SAEReference) -> SAELayout:
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
    """From the layer, the submodule's name (`resid_post_layer_8`) and which side was recorded."""
    if "layer" not in trainer:
        return None
    layer = trainer.get("layer")
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise SAEError(f"{config.path}: layer must be an integer from 0, got {layer!r:.40}")
    submodule = trainer.text("submodule_name", "resid_post")
    side = config.section("buffer").text("io", "out")
    if side == "in_and_out":
        refuse_transcoder(config.path, "its buffer recorded in_and_out")
    if "mlp" in submodule:
        kind = "hook_mlp_out" if side == "out" else "hook_mlp_in"
    elif "attn" in submodule or "attention" in submodule:
        kind = "hook_attn_out" if side == "out" else "hook_attn_in"
    else:
        kind = "hook_resid_post" if side == "out" else "hook_resid_pre"
    return f"blocks.{layer}.{kind}"


def _k(files: SAEFiles, trainer: Config) -> int:
    """k of the configuration; the library refuses one that contradicts the weights'."""
    k = trainer.count("k")
    if "k" in files.names and files.shape("k", rank=0) == ():
        stored = files.tensors.tensor("k").item()
        if stored != k:
            raise SAEError(f"{files.path}: k is {stored}, {trainer.path.name} says {k}")
    return k
