"""qresearch: one `.pt` with the four tensors of two linear layers; relu, resid_post, b_dec not
subtracted. The layer is only in its name (`DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt`)."""

from __future__ import annotations

import re

from sae.formats.layout import SAEFiles, SAELayout, Stored
from sae.formats.places import choose_hook
from sae.source import ResolvedSAE

NAME = "qresearch"

_TENSORS = {
    "W_enc": Stored("encoder.weight"),
    "W_dec": Stored("decoder.weight", transposed=True),
    "b_enc": Stored("encoder.bias"),
    "b_dec": Stored("decoder.bias"),
}
_LAYER = re.compile(r"-SAE-l(\d+)\b")


def matches(files: SAEFiles) -> bool:
    named = _LAYER.search(files.path.name) is not None
    return (
        files.tensors.container == "torch"
        and files.names == {stored.name for stored in _TENSORS.values()}
        and "config.json" not in files.configs
        and named
    )


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    d_sae, d_in = files.shape("encoder.weight", rank=2)
    layer = files.search(ref, _LAYER)
    guessed = None if layer is None else f"blocks.{layer}.hook_resid_post"
    return SAELayout(
        format=NAME,
        architecture="standard",
        hook=choose_hook(files.path, ref, stated=None, guessed=guessed),
        d_in=d_in,
        d_sae=d_sae,
        tensors=_TENSORS,
        apply_b_dec_to_input=False,
    )
