"""Qwen-Scope: `layerN.sae.pt` with W_enc [d_sae, d_in], W_dec [d_in, d_sae], b_enc, b_dec; TopK at
resid_post of every layer, b_dec not subtracted.

The file holds neither its layer nor k: they are in its name and in the repository's
(`SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`). A `config.json` beside it may state k.
"""

from __future__ import annotations

import re

from sae.errors import SAEError
from sae.formats.layout import SAEFiles, SAELayout, Stored
from sae.formats.places import choose_layer_output
from sae.source import ResolvedSAE

NAME = "qwen_scope"

_LAYER = re.compile(r"\blayer(\d+)\.sae\b")
_K = re.compile(r"-L0_(\d+)\b")


def matches(files: SAEFiles) -> bool:
    return (
        files.tensors.container == "torch"
        and bool({"W_enc", "W_dec"} & files.names)
        and "threshold" not in files.names
    )


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    d_sae, d_in = files.shape("W_enc", rank=2)
    return SAELayout(
        format=NAME,
        architecture="topk",
        hook=choose_layer_output(files, ref, _LAYER),
        d_in=d_in,
        d_sae=d_sae,
        tensors={
            "W_enc": Stored("W_enc"),
            "W_dec": Stored("W_dec", transposed=True),
            "b_enc": Stored("b_enc"),
            "b_dec": Stored("b_dec"),
        },
        k=_k(files, ref),
        apply_b_dec_to_input=False,
    )


def _k(files: SAEFiles, ref: ResolvedSAE) -> int:
    config = files.configs.get("config.json")
    if config is not None and "k" in config:
        return config.count("k")
    k = files.search(ref, _K)
    if k is None or int(k) < 1:
        raise SAEError(
            f'{files.path}: k is stated nowhere; put {{"k": 50}} into a config.json beside it, '
            "or keep the repository's name (...-L0_50) in the path"
        )
    return int(k)
