"""Goodfire: one `.pth` or `.pt` with encoder_linear and decoder_linear; relu, resid_post, b_dec not
subtracted. The layer is only in its name (`Llama-3.1-8B-Instruct-SAE-l19`)."""

from __future__ import annotations

import re

from sae.formats.layout import SAEFiles, SAELayout, Stored
from sae.formats.places import choose_hook
from sae.source import ResolvedSAE

NAME = "goodfire"


def matches(files: SAEFiles) -> bool:
    return files.tensors.container == "torch" and any(
        name.startswith(("encoder_linear.", "decoder_linear.")) for name in files.names
    )


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    d_sae, d_in = files.shape("encoder_linear.weight", rank=2)
    layer = files.search(ref, re.compile(r"-SAE-l(\d+)\b"))
    guessed = None if layer is None else f"blocks.{layer}.hook_resid_post"
    return SAELayout(
        format=NAME,
        architecture="standard",
        hook=choose_hook(files.path, ref, stated=None, guessed=guessed),
        d_in=d_in,
        d_sae=d_sae,
        tensors={
            "W_enc": Stored("encoder_linear.weight"),
            "W_dec": Stored("decoder_linear.weight", transposed=True),
            "b_enc": Stored("encoder_linear.bias"),
            "b_dec": Stored("decoder_linear.bias"),
        },
        apply_b_dec_to_input=False,
    )
