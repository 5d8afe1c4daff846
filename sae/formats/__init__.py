"""The published formats, one loader each, told apart by what the files hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from sae.errors import SAEError
from sae.files import (
    CHECKPOINTS,
    CONFIG_NAMES,
    OWN_CONFIG,
    SET_CONFIG,
    clt_decoder,
    find_weights,
    own_config,
)
from sae.formats import (
    attention_saes,
    circuit_tracer,
    dictionary_learning,
    direction,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    qresearch,
    qwen_scope,
    sae_lens,
    sparsify,
)
from sae.formats.layout import Config, SAEFiles, SAELayout, read_config
from sae.formats.set_config import read_yaml
from sae.formats.unserved import refuse_contradiction, refuse_unserved
from sae.source import ResolvedSAE
from sae.tensors import JoinedFile, TensorFile, open_tensors


class Format(Protocol):
    """A module of this package."""

    NAME: str

    def matches(self, files: SAEFiles) -> bool:
        """Whether the files are of this format, by what they hold and what they are called."""
        ...

    def read(self, files: SAEFiles, ref: ResolvedSAE) -> SAELayout:
        """The layout of the files. Raises SAEError if they do not fit the format."""
        ...


# The first that matches is taken: the earlier ones can be told by tensors or keys of their own.
_FORMATS: tuple[Format, ...] = (
    gemma_scope,
    gemma_scope_2,
    sparsify,
    llamascopium,
    llama_scope,
    circuit_tracer,
    goodfire,
    qresearch,
    attention_saes,
    dictionary_learning,
    qwen_scope,
    sae_lens,
    direction,
)


def open_layout(ref: ResolvedSAE) -> tuple[SAEFiles, SAELayout]:
    """Open a resolved source at the cost of its headers, and say what it holds.

    Raises:
        SAEError: if the files cannot be read, are of no known format, or do not fit it.
    """
    weights = find_weights(Path(ref.path), ref.layer)
    files = SAEFiles(_tensors(weights), _configs(weights))
    refuse_unserved(files)
    layout = replace(_detect(files, ref).read(files, ref), sink_norm=files.sink_norm())
    refuse_contradiction(files, layout.format, layout.kind)
    layout.check(files.tensors)
    if ref.layer is not None and ref.layer != layout.read_point.layer:
        raise SAEError(
            f"{files.path}: layer={ref.layer} is stated, but this {layout.kind} belongs to layer "
            f"{layout.read_point.layer}; layer= chooses one layer of a source that has several"
        )
    return files, layout


def _tensors(weights: Path) -> TensorFile:
    """The weight file, or the two files of a cross-layer transcoder's layer."""
    name = clt_decoder(weights.name)
    if name is None:
        return open_tensors(weights)
    decoder = weights.with_name(name)
    if not decoder.is_file():
        raise SAEError(f"{weights}: {name}, which holds the decoder, is not beside it")
    return JoinedFile([open_tensors(weights), open_tensors(decoder)])


def _configs(weights: Path) -> dict[str, Config]:
    folders = [weights.parent]
    if weights.parent.name == CHECKPOINTS:
        folders.append(weights.parent.parent)
    found = {
        name: read_config(folder / name)
        for folder in reversed(folders)
        for name in CONFIG_NAMES
        if (folder / name).is_file()
    }
    own = own_config(weights.name)
    if own is not None and weights.with_name(own).is_file():
        found[OWN_CONFIG] = read_config(weights.with_name(own))
    described = weights.with_name(SET_CONFIG)
    if described.is_file():
        found[SET_CONFIG] = read_yaml(described)
    return found


def _detect(files: SAEFiles, ref: ResolvedSAE) -> Format:
    for candidate in _FORMATS:
        if ref.format == candidate.NAME or (ref.format is None and candidate.matches(files)):
            return candidate
    raise SAEError(
        f"{files.path}: not a known format of an SAE (tensors: "
        f"{', '.join(sorted(files.names)[:6]) or 'none'})"
    )
