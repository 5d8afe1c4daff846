"""SAELens' registry of published SAEs: `sae_lens://RELEASE/SAE_ID`.

The registry is a YAML file inside the `sae-lens` package. It is read without importing the package,
whose import takes long and is not needed.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.errors import SAEError
from sae.numbers import finite

SCHEME = "sae_lens://"

_FILE_NAME = "pretrained_saes.yaml"

# SAELens' own name of the loader of a release; none means its own format.
_LOADERS = (
    None,
    "sae_lens",
    "gemma_2",
    "gemma_3",
    "llama_scope",
    "dictionary_learning_1",
    "qwen_scope",
    "sparsify",
    "goodfire",
)


@dataclass(frozen=True)
class RegistryEntry:
    """Where a registered SAE lies, and what the registry says beside its configuration."""

    repo: str
    path: str
    norm_scaling_factor: float | None
    normalize_activations: str | None
    model: str | None = None
    l0: float | None = None
    variance_explained: float | None = None

    @property
    def source(self) -> str:
        """The hub source that it stands for."""
        return f"hf://{self.repo}/{self.path}"


def look_up(source: str) -> RegistryEntry:
    """Find `sae_lens://RELEASE/SAE_ID`; SAEError with the nearest names where there is none."""
    release_name, separator, sae_id = source.removeprefix(SCHEME).partition("/")
    if not separator or not sae_id:
        raise SAEError(f"{source}: expected sae_lens://RELEASE/SAE_ID")
    releases = _registry()
    release = releases.get(release_name)
    if release is None:
        raise SAEError(f"{source}: no release {release_name!r}{_nearest(release_name, releases)}")
    saes = {str(sae["id"]): sae for sae in release["saes"]}
    if sae_id not in saes:
        raise SAEError(f"{source}: no SAE {sae_id!r} in {release_name}{_nearest(sae_id, saes)}")
    loader = release.get("conversion_func")
    if loader is not None and "transcoder" in loader:
        raise SAEError(f"{source}: this is a transcoder ({loader}); only SAEs can be served")
    if loader not in _LOADERS:
        raise SAEError(f"{source}: SAELens reads it with {loader}, which has no counterpart here")
    sae, overrides = saes[sae_id], release.get("config_overrides") or {}
    return RegistryEntry(
        repo=release["repo_id"],
        path=str(sae["path"]),
        norm_scaling_factor=sae.get("norm_scaling_factor"),
        normalize_activations=overrides.get("normalize_activations"),
        model=release.get("model"),
        l0=finite(sae.get("l0")),
        variance_explained=finite(sae.get("variance_explained")),
    )


@functools.cache
def _registry() -> dict[str, Any]:
    package = importlib.util.find_spec("sae_lens")
    folders = (package.submodule_search_locations or []) if package is not None else []
    path = next((Path(folder) / _FILE_NAME for folder in folders), None)
    if path is None or not path.is_file():
        raise SAEError(
            "sae_lens:// sources need the registry inside the package sae-lens, which is not "
            "installed: pip install sae-lens, or name the repository as hf://OWNER/REPO/SUBFOLDER"
        )
    import yaml

    with path.open(encoding="utf-8") as file:
        registry: dict[str, Any] = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return registry


def _nearest(name: str, names: dict[str, Any]) -> str:
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(nearest)}" if nearest else ""
