"""Which files make up an SAE: one weight file, what describes it, what is known of its features.

The same choice is made in a folder on disk and in a repository of the hub. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sae.errors import SAEError
from sae.unserved import refuse_by_listing

# What directions alone come in; beside other weights it is something else.
_DIRECTION_SUFFIXES = (".gguf", ".npy")
_DICTIONARY_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
WEIGHT_SUFFIXES = (*_DICTIONARY_SUFFIXES, *_DIRECTION_SUFFIXES)
# What SAELens' training keeps beside a checkpoint: the factor that it has not folded in yet.
SCALER_NAME = "activation_scaler.json"
CONFIG_NAMES = ("cfg.json", "config.json", "hyperparams.json", SCALER_NAME)
FEATURES_NAME = "features.jsonl"

# Llama Scope keeps its weights one folder down.
CHECKPOINTS = "checkpoints"
CHECKPOINT = f"{CHECKPOINTS}/final.safetensors"

# sparsify keeps the configuration of a run, which older ones of its folders need, one folder up.
SPARSIFY_WEIGHTS = "sae.safetensors"
RUN_CONFIG = "config.json"

# One tensor file in parts, as large models are published.
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.\w+")
_SHARD_INDEX = re.compile(r".+\.index\.json")

# What the published suites call their weights: what else lies beside them is something else.
_WEIGHT_NAMES = (
    "sae_weights.safetensors",
    SPARSIFY_WEIGHTS,
    "ae.pt",
    "ae.safetensors",
    "params.npz",
    "params.safetensors",
)
# SAELens' statistics and the state of its training, in the suffix of weights.
_NO_WEIGHTS = (
    "sparsity.safetensors",
    "activations_store_state.safetensors",
    "activation_whitening.safetensors",
    "trainer_state.pt",
)


def is_weight_file(name: str) -> bool:
    return name.endswith(WEIGHT_SUFFIXES) and name not in _NO_WEIGHTS


def choose_weights(source: str, names: Iterable[str]) -> str:
    """The one weight file among the names of a folder and of its checkpoints folder.

    Raises:
        SAEError: there is none, several would do, or they are of a kind that is not served.
    """
    names = sorted(names)
    refuse_by_listing(source, names)
    weights = [name for name in names if "/" not in name and is_weight_file(name)]
    if any(name.endswith(_DICTIONARY_SUFFIXES) for name in weights):
        weights = [name for name in weights if not name.endswith(_DIRECTION_SUFFIXES)]
    if not weights and CHECKPOINT in names:
        return CHECKPOINT
    if not weights:
        _refuse_shards(source, names)
        some = ", ".join(names[:4]) or "nothing"
        raise SAEError(
            f"{source}: no weight file in it ({', '.join(WEIGHT_SUFFIXES)}); it holds {some}"
        )
    named = [name for name in weights if name in _WEIGHT_NAMES]
    if len(named) == 1:
        return named[0]
    _refuse_shards(source, names)
    if len(weights) > 1:
        raise SAEError(
            f"{source}: {len(weights)} weight files ({', '.join(weights[:4])}, ...); "
            f"name one of them, as {source.rstrip('/')}/{weights[0]}"
        )
    return weights[0]


def _names_beside(path: Path) -> list[str]:
    try:
        return [file.name for file in path.parent.iterdir()]
    except OSError:  # a folder that may be entered and not listed
        return []


def refuse_unreadable(source: str, name: str, names: Iterable[str]) -> None:
    """Refuse one file of a folder if its name, or what lies beside it, says that it is no SAE's.

    Args:
        names: everything in the folder; other weights there play no part.

    Raises:
        SAEError: it is one of a kind that is not served, or a part of a larger file.
    """
    refuse_by_listing(source, [name, *(other for other in names if not is_weight_file(other))])
    _refuse_shards(source, [name])


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


def find_weights(path: Path) -> Path:
    """The one weight file that a path on disk names; SAEError where it is none or several."""
    if not path.is_dir():
        refuse_unreadable(str(path), path.name, _names_beside(path))
        return path
    names = {file.name for file in path.iterdir() if file.is_file()}
    if (path / CHECKPOINT).is_file():
        names.add(CHECKPOINT)
    return path / choose_weights(str(path), names)


def companions(weights: str) -> tuple[str, ...]:
    """Names of files that may lie beside a weight file and belong to it."""
    return (*CONFIG_NAMES, FEATURES_NAME, f"{weights}.{FEATURES_NAME}")
