"""Goodfire: one `.pth` or `.pt` with encoder_linear and decoder_linear; relu, resid_post, b_dec not
subtracted. The layer is only in its name (`Llama-3.1-8B-Instruct-SAE-l19`)."""

from __future__ import annotations

import re

from sae.formats.layout import SAEFiles, SAELayout, linear_layers
from sae.formats.places import choose_layer_output
from sae.source import ResolvedSAE

NAME = "goodfire"

_LAYER = re.compile(r"-SAE-l(\d+)\b")


def matches(files: SAEFiles) -> bool:
    return files.tensors.container == "torch" and any(
        name.startswith(("encoder_linear.", "decoder_linear.")) for name in files.names
    )


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    d_sae, d_in = files.shape("encoder_linear.weight", rank=2)
    return SAELayout(
        format=NAME,
        architecture="standard",
        hook=choose_layer_output(files, ref, _LAYER),
        d_in=d_in,
        d_sae=d_sae,
        tensors=linear_layers("encoder_linear", "decoder_linear"),
        apply_b_dec_to_input=False,
    )
