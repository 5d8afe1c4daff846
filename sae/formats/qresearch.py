"""qresearch: one `.pt` with the four tensors of two linear layers; relu, resid_post, b_dec not
subtracted. The layer is only in its name (`DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt`)."""

from __future__ import annotations

from sae.formats.goodfire import LAYER, relu_layout
from sae.formats.layout import SAEFiles, SAELayout, linear_layers
from sae.source import ResolvedSAE

NAME = "qresearch"

_TENSORS = linear_layers()


def matches(files: SAEFiles) -> bool:
    return (
        files.tensors.container == "torch"
        and files.names == {stored.name for stored in _TENSORS.values()}
        and "config.json" not in files.configs
        # dictionary_learning's have these names too: a file of any other name is taken for theirs.
        and LAYER.search(files.path.name) is not None
    )


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    return relu_layout(NAME, files, ref, _TENSORS)
