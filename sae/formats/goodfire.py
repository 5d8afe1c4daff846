"""Goodfire: one `.pth` or `.pt` with encoder_linear and decoder_linear; relu, resid_post, b_dec not
subtracted. The layer is only in its name (`Llama-3.1-8B-Instruct-SAE-l19`)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sae.formats.layout import SAEFiles, SAELayout, Stored, linear_layers
from sae.formats.places import choose_layer_output
from sae.source import ResolvedSAE

NAME = "goodfire"

#: The layer, in the names of files and repositories of both Goodfire and qresearch.
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
    """A ReLU SAE of two linear layers, at the output of the layer that `LAYER` finds in the names.

    Raises:
        SAEError: if W_enc is missing or no matrix, or the layer is stated nowhere.
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
