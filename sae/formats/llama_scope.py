"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`, encoder.weight
[d_sae, d_in], decoder.weight [d_in, d_sae]. Trained as top-k, shipped as JumpReLU with one
threshold.

Trained on x * s with s = sqrt(d_in) / average norm. Folded: W_enc*s, W_dec/s, b_dec/s. The
threshold is stated for unscaled inputs, and is multiplied by s as SAELens does.
"""

from __future__ import annotations

import math

from sae.errors import SAEError
from sae.formats.layout import Config, SAEFiles, SAELayout, Stored, choose_hook, refuse_transcoder
from sae.source import SAEReference

NAME = "llama_scope"

# Beyond these, folding s would leave float32.
MIN_NORM = 1e-9
MAX_NORM = 1e9


def matches(files: SAEFiles) -> bool:
    config = files.configs.get("hyperparams.json")
    described = config is not None and "dataset_average_activation_norm" in config
    named = {"encoder.weight", "decoder.weight"} <= files.names
    return files.tensors.container == "safetensors" and (described or named)


def read(files: SAEFiles, ref: SAEReference) -> SAELayout:
    config = files.config("hyperparams.json")
    hook_in = config.text("hook_point_in")
    hook_out = config.text("hook_point_out", hook_in)
    if hook_out != hook_in:
        refuse_transcoder(config.path, f"it reads at {hook_in:.60} and writes at {hook_out:.60}")
    _check_activation(config)
    d_in = config.count("d_model")
    average_norm = config.section("dataset_average_activation_norm").number("in")
    if not MIN_NORM <= average_norm <= MAX_NORM:
        raise SAEError(
            f"{config.path}: the average norm must be from {MIN_NORM} to {MAX_NORM}, "
            f"got {average_norm}"
        )
    scale = math.sqrt(d_in) / average_norm
    return SAELayout(
        format=NAME,
        architecture="jumprelu",
        hook=choose_hook(config.path, ref, hook_in, guessed=None),
        d_in=d_in,
        d_sae=config.count("d_sae"),
        tensors={
            "W_enc": Stored("encoder.weight"),
            "W_dec": Stored("decoder.weight", transposed=True),
            "b_enc": Stored("encoder.bias"),
            "b_dec": Stored("decoder.bias"),
        },
        constants={"threshold": config.number("jump_relu_threshold") * scale},
        apply_b_dec_to_input=config.flag("apply_decoder_bias_to_pre_encoder", False),
        scale=scale,
    )


def _check_activation(config: Config) -> None:
    for key, expected in (("act_fn", "jumprelu"), ("norm_activation", "dataset-wise")):
        stated = config.text(key, expected)
        if stated != expected:
            raise SAEError(f"{config.path}: unknown {key} {stated!r:.60}, expected {expected}")
