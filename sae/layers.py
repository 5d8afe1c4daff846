"""Sources of several layers: `layer=all` is one dictionary for each of them, named `NAME.L`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sae import hub
from sae.errors import SAEError
from sae.files import find_weights, layers_of
from sae.formats import direction
from sae.source import ALL_LAYERS, ResolvedSAE, SAEReference, resolve
from sae.tensors import open_tensors


def resolve_all(ref: SAEReference) -> list[ResolvedSAE]:
    """Every dictionary that a reference stands for: one, or with `layer=all` one for each layer.

    Raises:
        SAEError: as `sae.source.resolve` does, or if the source has one layer only.
    """
    if ref.layer != ALL_LAYERS:
        return [resolve(ref)]
    found = layers(ref)
    if not found:
        raise SAEError(
            f"{ref.source}: layer=all needs a source of several layers, but this one has one layer"
        )
    return [resolve(replace(ref, name=f"{ref.name}.{layer}", layer=layer)) for layer in found]


def layers(ref: SAEReference) -> list[int]:
    """The layers of a source, ascending; none if it holds one dictionary.

    Raises:
        SAEError: if it cannot be found or fetched.
    """
    if ref.source.startswith(hub.SCHEME) and (found := hub.layers(ref.source)):
        return found
    path = Path(resolve(replace(ref, layer=None)).path)
    if path.is_dir() and (by_layer := layers_of(str(path), (file.name for file in path.iterdir()))):
        return [*by_layer]
    return [*direction.layers(open_tensors(find_weights(path)).headers)]
