"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`, encoder.weight
[d_sae, d_in], decoder.weight [d_in, d_sae]. Trained as top-k, shipped as JumpReLU with one
threshold.

Trained on x * s with s = sqrt(d_in) / average norm. Folded: W_enc*s, W_dec/s, b_dec/s. The
threshold theta is stated for unscaled inputs, and is multiplied by s as SAELens does.

With `sparsity_include_decoder_norm` theta was chosen on activations times |D_i|, the norm of the
decoder's row as it is stored: lm-saes folds that norm into the encoder before it compares
(`transform_to_unit_decoder_norm`), so latent i fires if (s E_i x + b_i) |D_i| > theta s. SAELens
leaves the norm out, which gives another set of active latents wherever |D_i| is not 1.

The transcoders (LXTC) read `ln2.hook_normalized`, before the norm's gain, and write `hook_mlp_out`;
each side has a norm and a scale of its own: W_enc*s_in, W_dec/s_out, b_dec/s_out.
"""

from __future__ import annotations

import math
from pathlib import Path

from sae.card import KIND_SAE
from sae.errors import SAEError
from sae.formats.layout import Config, SAEFiles, SAELayout, linear_layers
from sae.formats.places import choose_stated
from sae.source import ResolvedSAE

NAME = "llama_scope"

# Beyond these, folding s would leave the range of float32.
MIN_NORM = 1e-9
MAX_NORM = 1e9


def matches(files: SAEFiles) -> bool:
    described = "hyperparams.json" in files.configs
    # dictionary_learning's have these names too, and a config.json.
    named = {"encoder.weight", "decoder.weight"} <= files.names and not files.configs
    return files.tensors.container == "safetensors" and (described or named)


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    if "hyperparams.json" not in files.configs:
        raise SAEError(
            f"{files.path}: missing configuration: no hyperparams.json, which an SAE of Llama "
            "Scope has beside its weights or one folder up, and no config.json, which one of "
            "dictionary_learning has"
        )
    config = files.config("hyperparams.json")
    _check_activation(config)
    d_in = config.count("d_model")
    scale = dataset_scale(config, d_in, "in")
    kind, reads, hook = choose_stated(
        config, ref, config.words("hook_point_in"), config.words("hook_point_out")
    )
    tensors = linear_layers()
    constants = {"threshold": config.number("jump_relu_threshold") * scale}
    if not config.flag("use_decoder_bias", True):
        del tensors["b_dec"]
        constants["b_dec"] = 0.0
    return SAELayout(
        format=NAME,
        architecture="jumprelu",
        kind=kind,
        hook=hook,
        reads=reads,
        d_in=d_in,
        d_sae=config.count("d_sae"),
        tensors=tensors,
        constants=constants,
        threshold_over_decoder_norm=config.flag("sparsity_include_decoder_norm", False),
        apply_b_dec_to_input=config.flag("apply_decoder_bias_to_pre_encoder", False),
        scale=scale,
        scale_out=None if kind == KIND_SAE else dataset_scale(config, d_in, "out"),
    )


def dataset_scale(config: Config, d: int, side: str) -> float:
    """s = sqrt(d) / average norm, with the norm that a configuration states for a side.

    Raises:
        SAEError: if it states none, or one with which s would leave the range of float32.
    """
    norm = config.section("dataset_average_activation_norm").number(side)
    return scale_of_norm(config.path, norm, d)


def scale_of_norm(path: Path, norm: float, d: int) -> float:
    """s = sqrt(d) / norm. Raises SAEError if s would leave the range of float32."""
    if not MIN_NORM <= norm <= MAX_NORM:
        raise SAEError(
            f"{path}: the average norm must be from {MIN_NORM} to {MAX_NORM}, got {norm}"
        )
    return math.sqrt(d) / norm


def refuse_glu_encoder(config: Config) -> None:
    """Raises SAEError if the encoder is a gated linear unit, of which no suite was published."""
    if config.flag("use_glu_encoder", False):
        raise SAEError(f"{config.path}: unknown architecture, use_glu_encoder is true")


def _check_activation(config: Config) -> None:
    refuse_glu_encoder(config)
    for key, expected in (("act_fn", "jumprelu"), ("norm_activation", "dataset-wise")):
        stated = config.text(key, expected)
        if stated != expected:
            raise SAEError(f"{config.path}: unknown {key} {stated!r:.60}, expected {expected}")
