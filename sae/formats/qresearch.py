"""qresearch: one `.pt` with the four tensors of two linear layers; relu, resid_post, b_dec not
subtracted. The layer is only in its name (`DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt`)."""

from __future__ import annotations

import re

from sae.formats.layout import SAEFiles, SAELayout, linear_layers
from sae.formats.places import choose_layer_output
from sae.source import ResolvedSAE

NAME = "qresearch"

_TENSORS = linear_layers()
_LAYER = re.compile(r"-SAE-l(\d+)\b")


def matches(files: SAEFiles) -> bool:
    return (
        files.tensors.container == "torch"
        and files.names == {stored.name for stored in _TENSORS.values()}
        and "config.json" not in files.configs
        # dictionary_learning's have these names too: a file of any other name is taken for theirs.
        and _LAYER.search(files.path.name) is not None
    )


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    d_sae, d_in = files.shape("encoder.weight", rank=2)
    return SAELayout(
        format=NAME,
        architecture="standard",
        hook=choose_layer_output(files, ref, _LAYER),
        d_in=d_in,
        d_sae=d_sae,
        tensors=_TENSORS,
        apply_b_dec_to_input=False,
    )
