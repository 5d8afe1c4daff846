"""Which files make up an SAE: one weight file, what describes it, what is known of its features.

The same choice is made in a folder on disk and in a repository of the hub. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sae.errors import SAEError

WEIGHT_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
CONFIG_NAMES = ("cfg.json", "config.json", "hyperparams.json")
FEATURES_NAME = "features.jsonl"

# Llama Scope keeps its weights one folder down.
CHECKPOINTS = "checkpoints"
CHECKPOINT = f"{CHECKPOINTS}/final.safetensors"

# What the published suites call their weights: what else lies beside them is something else.
_WEIGHT_NAMES = (
    "sae_weights.safetensors",
    "sae.safetensors",
    "ae.pt",
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

    SAEError where there is none, or where several would do.
    """
    names = sorted(names)
    weights = [name for name in names if "/" not in name and is_weight_file(name)]
    if not weights and CHECKPOINT in names:
        return CHECKPOINT
    if not weights:
        some = ", ".join(names[:4]) or "nothing"
        raise SAEError(
            f"{source}: no weight file in it ({', '.join(WEIGHT_SUFFIXES)}); it holds {some}"
        )
    named = [name for name in weights if name in _WEIGHT_NAMES]
    if len(named) == 1:
        return named[0]
    if len(weights) > 1:
        raise SAEError(
            f"{source}: {len(weights)} weight files ({', '.join(weights[:4])}, ...); "
            f"name one of them, as {source.rstrip('/')}/{weights[0]}"
        )
    return weights[0]


def find_weights(path: Path) -> Path:
    """The one weight file that a path on disk names; SAEError where it is none or several."""
    if not path.is_dir():
        return path
    names = {file.name for file in path.iterdir() if file.is_file()}
    if (path / CHECKPOINT).is_file():
        names.add(CHECKPOINT)
    return path / choose_weights(str(path), names)


def companions(weights: str) -> tuple[str, ...]:
    """Names of files that may lie beside a weight file and belong to it."""
    return (*CONFIG_NAMES, FEATURES_NAME, f"{weights}.{FEATURES_NAME}")
