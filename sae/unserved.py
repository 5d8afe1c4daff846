"""Dictionaries of kinds that are not served, told before their weights are fetched or read.

Names rule a source out where the publisher's repository, folder or file says what it is; what only
the tensors show is refused by `sae.formats.unserved`. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NoReturn

from sae.errors import SAEError

#: Why these are refused, whatever shows that a source is one.
TRANSCODER: Final = (
    "which reads at one hook point and writes at another; only SAEs can be served so far"
)
CROSS_LAYER: Final = "which reads at one layer and writes at many; only SAEs can be served so far"
CROSSCODER: Final = "which reads several layers at once; only SAEs can be served so far"

_NOT_IN_WORD: Final = r"(?<![a-z]){}(?![a-z])"
_WORDS: Final = {
    "a cross-layer transcoder": ("clts?", CROSS_LAYER),
    "a transcoder": ("transcoders?", TRANSCODER),
    "a crosscoder": ("crosscoders?", CROSSCODER),
    "a Lorsa (low-rank sparse attention)": ("lorsas?", "which attends over the sequence"),
}
_PATTERNS: Final = {
    what: (re.compile(_NOT_IN_WORD.format(word), re.IGNORECASE), why)
    for what, (word, why) in _WORDS.items()
}
_SAE_WORD: Final = re.compile(_NOT_IN_WORD.format("saes?"), re.IGNORECASE)

# Gemma Scope's attention SAEs read the concatenated heads, whatever their folders are called.
_GEMMA_SCOPE_HEADS: Final = re.compile(
    r"(?:^|/)gemma-scope-(?:2-.*/attn_out(?:_all)?(?:/|$)|(?!2-)[^/]*-att(?:/|$))"
)

_LISTINGS: Final = (
    (
        re.compile(r"W_(?:enc|dec)_\d+\.safetensors"),
        "a cross-layer transcoder of circuit-tracer",
        CROSS_LAYER,
    ),
    (
        re.compile(r"params_layer_\d+\.safetensors"),
        "a layer of a crosscoder or of a cross-layer transcoder of Gemma Scope 2",
        CROSSCODER,
    ),
)
_PER_LAYER: Final = re.compile(r"layer_\d+\.safetensors")
_CIRCUIT_TRACER_CONFIG: Final = "config.yaml"


def refuse_by_name(source: str, path: str, *more: str) -> None:
    """Refuse a source whose names say that it is of a kind that is not served.

    Args:
        source: what the message names.
        path: the repository and the path in it, or the last folders of a path on disk.
        more: other names of it.

    Raises:
        SAEError: it is one.
    """
    if _GEMMA_SCOPE_HEADS.search(path) or any("hook_z" in name for name in (path, *more)):
        raise SAEError(
            f"{source}: attention's per-head outputs (hook_z) are not supported; by its name this "
            "is an SAE of them"
        )
    for part in (*more, *reversed(path.split("/"))):
        says_sae = _SAE_WORD.search(part) is not None
        for what, (pattern, why) in _PATTERNS.items():
            if pattern.search(part) and not says_sae:
                raise SAEError(f"{source}: by its name ({part!r:.80}) this is {what}, {why}")
        # A folder of SAEs in a collection of both.
        if says_sae:
            return


def refuse_by_listing(source: str, names: Iterable[str]) -> None:
    """Refuse a folder whose file names say so. Raises SAEError."""
    names = list(names)
    for pattern, what, why in _LISTINGS:
        if found := next((name for name in names if pattern.fullmatch(name)), None):
            raise SAEError(f"{source}: {found} is {what}, {why}")
    if _CIRCUIT_TRACER_CONFIG in names and any(_PER_LAYER.fullmatch(name) for name in names):
        raise SAEError(
            f"{source}: its {_CIRCUIT_TRACER_CONFIG} and layer_N.safetensors are a set of "
            f"circuit-tracer's transcoders, each {TRANSCODER}"
        )


def refuse_transcoder(where: object, what: str) -> NoReturn:
    """Raises SAEError: this is a transcoder, told by `what`."""
    raise SAEError(f"{where}: this is a transcoder ({what}), {TRANSCODER}")
