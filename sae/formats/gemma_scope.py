"""Gemma Scope: `layer_L/width_W/average_l0_N/params.npz`, JumpReLU, b_dec not subtracted.

The file holds neither layer nor site: the layer is in the folder's name, the site in the
repository's (`gemma-scope-2b-pt-res`, `-mlp`, `-att`, whose input is the concatenated heads). The
case of the keys varies.

The transcoders (`-transcoders`) read the output of the norm before the MLP without its gain: their
model card says that the gain was folded into the MLP.

The SAEs in `embedding/width_W/average_l0_N` were trained on the token embeddings before Gemma
multiplies them by sqrt(d_in), so on x / sqrt(d_in) with x the stream before layer 0.
"""

from __future__ import annotations

import math
import re

from sae.card import KIND_SAE, KIND_TRANSCODER
from sae.errors import SAEError
from sae.formats.layout import SAEFiles, SAELayout, Stored, check_scaling_factor
from sae.formats.places import choose_hook, choose_places
from sae.source import ResolvedSAE

NAME = "gemma_scope"

_SITE = re.compile(r"gemma-scope-.*-(res|mlp|att|transcoders)\b")
_EMBEDDING = re.compile(r"embeddings?")
_EMBEDDING_HOOK = "blocks.0.hook_resid_pre"
_LAYER = re.compile(r"layer_(\d+)")
_TRANSCODERS = "transcoders"
_PLACES = ("ln2.hook_normalized", "hook_mlp_out")
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def matches(files: SAEFiles) -> bool:
    return files.tensors.container == "npz"


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    names = by_lower_case(files)
    embedding = files.folder(ref, _EMBEDDING) is not None
    d_in, d_sae = files.shape(names.get("w_enc", "w_enc"), rank=2)
    site, layer = files.search(ref, _SITE), files.search(ref, _LAYER)
    is_transcoder = site == _TRANSCODERS or ref.reads is not None or ref.writes is not None
    if is_transcoder:
        guessed = [None if layer is None else f"blocks.{layer}.{kind}" for kind in _PLACES]
        reads, hook = choose_places(files.path, ref, *guessed, guessed=True)
    else:
        guess = None if site is None or layer is None else f"blocks.{layer}.{_HOOKS[site]}"
        hook = reads = choose_hook(
            files.path,
            ref,
            stated=_EMBEDDING_HOOK if embedding else None,
            guessed=guess,
        )
    return SAELayout(
        format=NAME,
        architecture="jumprelu",
        kind=KIND_TRANSCODER if is_transcoder else KIND_SAE,
        hook=hook,
        reads=reads,
        d_in=d_in,
        d_sae=d_sae,
        tensors=jumprelu_tensors(names),
        apply_b_dec_to_input=False,
        scale=1 / math.sqrt(d_in) if embedding and d_in else 1.0,
        ignored=check_scaling_factor(files, names.get("scaling_factor", "scaling_factor"), d_sae),
    )


def by_lower_case(files: SAEFiles) -> dict[str, str]:
    """The stored names, by their lower case. Raises SAEError if two differ in case alone."""
    names: dict[str, str] = {}
    for name in sorted(files.names):
        if (other := names.setdefault(name.lower(), name)) != name:
            raise SAEError(f"{files.path}: {other} and {name} differ in case alone")
    return names


def jumprelu_tensors(names: dict[str, str]) -> dict[str, Stored]:
    """Gemma Scope's tensors, w_enc [d_in, d_sae]; a missing one is refused when it is read."""
    canonical = {"W_enc": "w_enc", "W_dec": "w_dec"} | {
        name: name for name in ("b_enc", "b_dec", "threshold")
    }
    return {
        name: Stored(names.get(stored, stored), transposed=name == "W_enc")
        for name, stored in canonical.items()
    }
