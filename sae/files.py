"""Which files make up an SAE: one weight file, what describes it, what is known of its features.

The same choice is made in a folder on disk and in a repository of the hub. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from sae.errors import SAEError

# Only directions come in these; beside other weights such a file is something else.
_DIRECTION_SUFFIXES = (".gguf", ".npy")
_DICTIONARY_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
WEIGHT_SUFFIXES = (*_DICTIONARY_SUFFIXES, *_DIRECTION_SUFFIXES)
# What SAELens' training keeps beside a checkpoint: the factor that it has not folded in yet.
SCALER_NAME = "activation_scaler.json"
CONFIG_NAMES = ("cfg.json", "config.json", "hyperparams.json", SCALER_NAME)
FEATURES_NAME = "features.jsonl"
# Put behind the name of a weight file without its suffix: the configuration of that file alone.
OWN_CONFIG = "_cfg.json"

# Llama Scope keeps its weights one folder down.
CHECKPOINTS = "checkpoints"
CHECKPOINT = f"{CHECKPOINTS}/final.safetensors"

# sparsify keeps the configuration of a run one folder up; its older folders need it.
SPARSIFY_WEIGHTS = "sae.safetensors"
RUN_CONFIG = "config.json"

# Sets with one file per layer. A cross-layer transcoder of circuit-tracer has two per layer.
CLT_ENCODER = re.compile(r"W_enc_(\d{1,5})\.safetensors", re.ASCII)
_NUMBERED = (
    CLT_ENCODER,
    re.compile(r"params_layer_(\d{1,5})\.safetensors", re.ASCII),
    re.compile(r"layer_?(\d{1,5})(?:\.sae)?\.(?:safetensors|pt)", re.ASCII),
)
_CLT_DECODER = re.compile(r"W_dec_\d{1,5}\.safetensors", re.ASCII)
# A crosscoder's slots are numbered, and its folder or its configuration names their layers.
_SLOTS = re.compile(r"(?:^|/)layer_(\d+(?:_\d+)+)_width_|layers\.\{(\d+(?:, ?\d+)+)\}")
# circuit-tracer's description of a set.
SET_CONFIG = "config.yaml"

# One tensor file in parts, as large models are published.
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.\w+")
_SHARD_INDEX = re.compile(r".+\.index\.json")

# What the published suites call their weights. Other files beside them are something else.
_WEIGHT_NAMES = (
    "sae_weights.safetensors",
    SPARSIFY_WEIGHTS,
    "ae.pt",
    "ae.safetensors",
    "params.npz",
    "params.safetensors",
)
# SAELens' statistics and the state of its training, which have the suffix of weights.
_NO_WEIGHTS = (
    "sparsity.safetensors",
    "activations_store_state.safetensors",
    "activation_whitening.safetensors",
    "trainer_state.pt",
)


def is_weight_file(name: str) -> bool:
    """Whether a file may hold the weights of an SAE, by its name."""
    return name.endswith(WEIGHT_SUFFIXES) and name not in _NO_WEIGHTS


def numbered_layer(name: str) -> int | None:
    """The layer's number in the name of a file of a set; None if the file is not one of a set."""
    match = next((match for pattern in _NUMBERED if (match := pattern.fullmatch(name))), None)
    return None if match is None else int(match[1])


def crosscoder_layers(text: str) -> list[int]:
    """The model's layers of a crosscoder's slots, from the name of a folder or a hook point."""
    match = _SLOTS.search(text)
    return [] if match is None else [int(layer) for layer in re.findall(r"\d+", match[0])]


def layers_of(folder: str, names: Iterable[str]) -> dict[int, str]:
    """The weight files of a folder that is a set of layers, by the model's layer, ascending.

    Args:
        folder: its path, whose last part may name the layers of a crosscoder's slots.
        names: the names of the files in it.
    """
    found = {layer: name for name in names if (layer := numbered_layer(name)) is not None}
    slots = crosscoder_layers(folder.rstrip("/").rpartition("/")[2])
    if slots:
        found = {slots[slot]: name for slot, name in found.items() if slot < len(slots)}
    return dict(sorted(found.items()))


def choose_weights(
    source: str, names: Iterable[str], layer: int | None = None, folder: str | None = None
) -> str:
    """The one weight file among the names of a folder and of its checkpoints folder.

    Args:
        source: what the messages name.
        names: the names of the files.
        layer: which of a set of layers.
        folder: the path of the folder; left out, it is the source.

    Raises:
        SAEError: if there is none, or several would do.
    """
    names = sorted(names)
    weights = [name for name in names if "/" not in name and is_weight_file(name)]
    weights = [name for name in weights if not _CLT_DECODER.fullmatch(name)]
    if any(name.endswith(_DICTIONARY_SUFFIXES) for name in weights):
        weights = [name for name in weights if not name.endswith(_DIRECTION_SUFFIXES)]
    if not weights and CHECKPOINT in names:
        return CHECKPOINT
    if not weights:
        _refuse_shards(source, names)
        if SET_CONFIG in names:
            raise SAEError(
                f"{source}: no weight file in it; {SET_CONFIG} describes a set whose weights lie "
                "elsewhere: name one of those that it lists"
            )
        some = ", ".join(names[:4]) or "nothing"
        raise SAEError(
            f"{source}: no weight file in it ({', '.join(WEIGHT_SUFFIXES)}); it holds {some}"
        )
    named = [name for name in weights if name in _WEIGHT_NAMES]
    if len(named) == 1:
        return named[0]
    _refuse_shards(source, names)
    by_layer = layers_of(source if folder is None else folder, weights)
    if layer in by_layer:
        return by_layer[layer]
    if len(weights) > 1:
        _refuse_several(source, weights, layer, by_layer)
    return weights[0]


def _refuse_several(
    source: str, weights: list[str], layer: int | None, by_layer: dict[int, str]
) -> NoReturn:
    if not by_layer:
        raise SAEError(
            f"{source}: {len(weights)} weight files ({', '.join(weights[:4])}, ...); "
            f"name one of them, as {source.rstrip('/')}/{weights[0]}"
        )
    has = ", ".join(map(str, by_layer))
    if layer is None:
        raise SAEError(
            f"{source}: a set of {len(by_layer)} layers ({has:.80}); state which, as "
            f"{source},layer={next(iter(by_layer))}, or layer=all for each of them"
        )
    raise SAEError(f"{source}: has no layer {layer}; it has {has:.80}")


def refuse_unreadable(source: str, name: str) -> None:
    """Refuse one file of a folder if its name says that it is a part of something else.

    Raises:
        SAEError: if it is a part of a larger file, or the decoder's file of an encoder's.
    """
    _refuse_shards(source, [name])
    if _CLT_DECODER.fullmatch(name):
        raise SAEError(
            f"{source}: {name} is the decoder of a cross-layer transcoder; name its folder with "
            f"layer=, or {name.replace('W_dec', 'W_enc')}, which is read with it"
        )


def _refuse_shards(source: str, names: list[str]) -> None:
    shards = [name for name in names if _SHARD.fullmatch(name)]
    index = next((name for name in names if _SHARD_INDEX.fullmatch(name)), None)
    found = shards[0] if shards else index
    if found is not None:
        count = f"{len(shards)} shards" if shards else "shards"
        raise SAEError(
            f"{source}: its weights are split into {count} ({found}); an SAE is read "
            "from one file: merge them with safetensors.torch.load_file and save_file into "
            "sae_weights.safetensors"
        )


def find_weights(path: Path, layer: int | None = None) -> Path:
    """The one weight file that a path on disk names. Raises SAEError if it is none or several."""
    if not path.is_dir():
        refuse_unreadable(str(path), path.name)
        return path
    names = {file.name for file in path.iterdir() if file.is_file()}
    if (path / CHECKPOINT).is_file():
        names.add(CHECKPOINT)
    return path / choose_weights(str(path), names, layer)


def clt_decoder(weights: str) -> str | None:
    """The decoder's file beside a cross-layer transcoder's encoder; None for any other file."""
    return weights.replace("W_enc", "W_dec") if CLT_ENCODER.fullmatch(weights) else None


def own_config(weights: str) -> str | None:
    """The name of a configuration of one torch file alone; None for any other weight file."""
    stem = weights.removesuffix(".pt")
    return None if stem == weights else f"{stem}{OWN_CONFIG}"


def companions(weights: str) -> tuple[str, ...]:
    """Names of files that may lie beside a weight file and belong to it."""
    for_it_alone = filter(None, (own_config(weights), clt_decoder(weights)))
    features = (FEATURES_NAME, f"{weights}.{FEATURES_NAME}")
    return (*CONFIG_NAMES, SET_CONFIG, *for_it_alone, *features)
