"""Goodfire: one `.pth` or `.pt` with encoder_linear and decoder_linear; relu, resid_post, b_dec not
subtracted. The layer is only in its name (`Llama-3.1-8B-Instruct-SAE-l19`)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sae.formats.layout import SAEFiles, SAELayout, Stored, linear_layers
from sae.formats.places import choose_layer_output
from sae.source import ResolvedSAE

NAME = "goodfire"

#: What both Goodfire and qresearch name a file or a repository by.
LAYER = re.compile(r"-SAE-l(\d+)\b")


def matches(files: SAEFiles) -> bool:
    return files.tensors.container == "torch" and any(
        name.startswith(("encoder_linear.", "decoder_linear.")) for name in files.names
    )


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    return relu_layout(NAME, files, ref, linear_layers("encoder_linear", "decoder_linear"))


def relu_layout(
    name: str, files: SAEFiles, ref: ResolvedSAE, tensors: Mapping[str, Stored]
) -> SAELayout:
    """A ReLU SAE of a layer's output, of two linear layers, which only `LAYER` places.

    Raises:
        SAEError: W_enc is missing or no matrix, or the layer is stated nowhere.
    """
    d_sae, d_in = files.shape(tensors["W_enc"].name, rank=2)
    return SAELayout(
        format=name,
        architecture="standard",
        hook=choose_layer_output(files, ref, LAYER),
        d_in=d_in,
        d_sae=d_sae,
        tensors=tensors,
        apply_b_dec_to_input=False,
    )
