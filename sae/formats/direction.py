"""Directions of the stream: control vectors, steering vectors, means of differences, probes.

`direction.L`, in GGUF (llama.cpp, repeng) or any other container, is one vector [d] that is added
to the output of block L, counted from 0. A tensor [n, d] or [d] alone in its file (`.safetensors`,
`.pt`, `.npy`) is n directions; only the user knows at which hook point.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from sae.card import KIND_DIRECTION
from sae.errors import SAEError
from sae.formats.layout import SAEFiles, SAELayout, Stored
from sae.formats.places import choose_hook
from sae.source import ResolvedSAE

NAME = "direction"

_NAMED = re.compile(r"direction\.(\d{1,5})", re.ASCII)
# Names by which a tensor that is alone in its file is a part of something else.
_OF_AN_SAE = re.compile(
    r"(?i)(?:encoder|decoder|w_?enc|w_?dec|b_?enc|b_?dec|threshold|log_jumprelu|bias)"
)


def layers(names: Iterable[str]) -> dict[int, str]:
    """The names of tensors `direction.L` by their layer L, ascending."""
    found = {int(match[1]): name for name in names if (match := _NAMED.fullmatch(name))}
    return dict(sorted(found.items()))


def matches(files: SAEFiles) -> bool:
    if files.tensors.container in ("gguf", "npy") or layers(files.names):
        return True
    if len(files.names) != 1:
        return False
    (name,) = files.names
    rank = len(files.tensors.headers[name].shape)
    return rank in (1, 2) and not files.configs and _OF_AN_SAE.match(name) is None


def read(files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
    by_layer = layers(files.names)
    if by_layer:
        layer = _chosen(files, ref, by_layer)
        name, stated = by_layer[layer], f"blocks.{layer}.hook_resid_post"
    else:
        name, stated = _only(files), None
    shape = files.tensors.headers[name].shape
    if len(shape) not in (1, 2):
        raise SAEError(f"{files.path}: {name} is {list(shape)}, expected [d] or [n, d]")
    if by_layer and len(shape) != 1:
        raise SAEError(f"{files.path}: {name} is {list(shape)}, expected one vector [d]")
    stored = Stored(name, row=len(shape) == 1)
    return SAELayout(
        format=NAME,
        architecture="direction",
        kind=KIND_DIRECTION,
        hook=choose_hook(files.path, ref, stated, guessed=None),
        d_in=shape[-1],
        d_sae=1 if stored.row else shape[0],
        tensors={"W_enc": stored, "W_dec": stored},
        constants={"b_dec": 0.0},
        apply_b_dec_to_input=False,
        ignored=tuple(by_layer.values()),
        unit_rows=True,
    )


def _chosen(files: SAEFiles, ref: ResolvedSAE, by_layer: dict[int, str]) -> int:
    """The layer that is asked for, or the only one."""
    if ref.layer is None and len(by_layer) == 1:
        return next(iter(by_layer))
    if ref.layer in by_layer:
        assert ref.layer is not None
        return ref.layer
    has = ", ".join(map(str, by_layer))
    if ref.layer is None:
        raise SAEError(
            f"{files.path}: has directions of {len(by_layer)} layers ({has:.80}); state which, as "
            f"{ref.source},layer={next(iter(by_layer))}, or layer=all for each of them"
        )
    raise SAEError(f"{files.path}: has no direction of layer {ref.layer}, only of {has:.80}")


def _only(files: SAEFiles) -> str:
    if len(files.names) != 1:
        some = ", ".join(sorted(files.names)[:4]) or "nothing"
        raise SAEError(
            f"{files.path}: no directions: expected tensors named direction.LAYER, or one tensor "
            f"alone; it holds {some}"
        )
    (name,) = files.names
    return name
