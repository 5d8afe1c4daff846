"""SAELens' registry of published SAEs: `sae_lens://RELEASE/SAE_ID`, and what else it tells of SAEs.

The registry is a YAML file inside the `sae-lens` package. It is read without importing the package,
whose import takes long and is not needed.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.errors import SAEError
from sae.numbers import finite
from sae.unserved import refuse_by_name

SCHEME = "sae_lens://"

_FILE_NAME = "pretrained_saes.yaml"

# SAELens' names for the loaders of releases; None stands for its own format.
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
    "gemma_2_transcoder",
    "mwhanna_transcoder",
    "mntss_clt_layer_transcoder",
    "connor_rob_hook_z",
    "llama_scope_r1_distill",
    "deepseek_r1",
)
# What the loaders that have no counterpart here read.
_UNSERVED_LOADERS = {
    "temporal": "a temporal SAE, which attends over the sequence",
}
# With this loader, a path in the registry is a layer's number.
_BY_NUMBER = "mntss_clt_layer_transcoder"

# A path in the hub's cache: models--OWNER--REPO/snapshots/COMMIT/PATH.
_CACHED = re.compile(r"(?:.*/)?models--([^/]+?)--([^/]+)/snapshots/[^/]+/(.+)")


@dataclass(frozen=True)
class RegistryFacts:
    """What the registry says of an SAE beside its files; None and False if it says nothing.

    Attributes:
        norm_scaling_factor: s that brings inputs to an average norm of sqrt(d_in), for weights into
            which it has not been folded.
        normalize_activations: a normalization that replaces the configuration's.
        center_writing_weights: it was trained on a model whose stream has no mean.
        model: what it was trained on.
        l0: mean number of active features.
        variance_explained: share of the variance, at most 1.
    """

    norm_scaling_factor: float | None = None
    normalize_activations: str | None = None
    center_writing_weights: bool = False
    model: str | None = None
    l0: float | None = None
    variance_explained: float | None = None

    @property
    def change_arithmetic(self) -> bool:
        """Whether files that are read without these facts are read wrongly."""
        return (
            self.norm_scaling_factor is not None
            or self.normalize_activations is not None
            or self.center_writing_weights
        )


@dataclass(frozen=True)
class RegistryEntry:
    """Where a registered SAE lies, and what the registry says beside its configuration."""

    release: str
    sae_id: str
    repo: str
    path: str
    facts: RegistryFacts

    @property
    def source(self) -> str:
        """The hub source that it stands for."""
        return f"hf://{self.repo}/{self.path}"


def look_up(source: str) -> RegistryEntry:
    """Find `sae_lens://RELEASE/SAE_ID`.

    Raises:
        SAEError: if there is none (the message has the nearest names), or it is of a kind that is
            not served, or `sae-lens` is not installed.
    """
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
    _refuse_loader(source, release.get("conversion_func"))
    entry = _entry(release_name, release, saes[sae_id])
    refuse_by_name(source, f"{entry.repo}/{entry.path}", sae_id)
    return entry


def find(repo: str, *paths: str) -> RegistryEntry | None:
    """The entry of a repository and the first of these paths in it that has one, if any has.

    Args:
        repo: OWNER/REPO.
        paths: of the folder or of the file that the registry names.
    """
    # Reading the whole registry takes a second, and most sources can be spared it.
    if repo not in _repositories():
        return None
    return next((found for path in paths if (found := _by_place().get((repo, path)))), None)


def find_on_disk(path: Path) -> RegistryEntry | None:
    """The entry that a folder or weight file on disk is a copy of; None if no name tells.

    The folders' names tell: those of the hub's cache, or of the repository and the path in it.
    """
    if match := _CACHED.fullmatch(path.as_posix()):
        owner, repo, inside = match.groups()
        return find(f"{owner}/{repo}", inside, inside.rpartition("/")[0])
    repositories = {repo.rpartition("/")[2]: repo for repo in _repositories()}
    for start in range(len(path.parts) - 1, 0, -1):
        if repo := repositories.get(path.parts[start - 1], ""):
            inside = "/".join(path.parts[start:])
            if found := find(repo, inside, inside.rpartition("/")[0]):
                return found
    return None


def alike(model: str, hook: str) -> RegistryEntry | None:
    """The first entry of this model and hook point whose facts change the arithmetic."""
    wanted = _plain_model(model)
    for entry in _by_place().values():
        if (
            entry.facts.change_arithmetic
            and _plain_model(entry.facts.model or "") == wanted
            and entry.sae_id.startswith(hook)
        ):
            return entry
    return None


def is_installed() -> bool:
    """Whether there is a registry to ask."""
    return _path() is not None


def _refuse_loader(source: str, loader: str | None) -> None:
    if loader in _LOADERS:
        return
    if loader in _UNSERVED_LOADERS:
        raise SAEError(
            f"{source}: this is {_UNSERVED_LOADERS[loader]}; SAELens reads it with {loader}, which "
            "has no counterpart here"
        )
    raise SAEError(f"{source}: SAELens reads it with {loader}, which has no counterpart here")


def _entry(release_name: str, release: dict[str, Any], sae: dict[str, Any]) -> RegistryEntry:
    overrides = release.get("config_overrides") or {}
    kwargs = overrides.get("model_from_pretrained_kwargs") or {}
    facts = RegistryFacts(
        norm_scaling_factor=sae.get("norm_scaling_factor"),
        normalize_activations=overrides.get("normalize_activations"),
        center_writing_weights=kwargs.get("center_writing_weights") is True,
        model=release.get("model"),
        l0=finite(sae.get("l0")),
        variance_explained=finite(sae.get("variance_explained")),
    )
    path = str(sae["path"]).strip("/")
    if release.get("conversion_func") == _BY_NUMBER:
        path = f"W_enc_{path}.safetensors"
    return RegistryEntry(release_name, str(sae["id"]), release["repo_id"], path, facts)


@functools.cache
def _by_place() -> dict[tuple[str, str], RegistryEntry]:
    """Every entry that a loader here reads, by repository and path in it."""
    if not is_installed():
        return {}
    entries = (
        _entry(name, release, sae)
        for name, release in _registry().items()
        if release.get("conversion_func") in _LOADERS
        for sae in release["saes"]
    )
    # If a place has several names, the first stands: they differ in nothing that is read here.
    found: dict[tuple[str, str], RegistryEntry] = {}
    for entry in entries:
        found.setdefault((entry.repo, entry.path), entry)
    return found


@functools.cache
def _repositories() -> frozenset[str]:
    """The names of all repositories, searched for in the text of the registry."""
    path = _path()
    if path is None:
        return frozenset()
    return frozenset(re.findall(r"^\s*repo_id:\s*[\"']?([^\s\"']+)", path.read_text("utf-8"), re.M))


def _plain_model(model: str) -> str:
    return model.rpartition("/")[2].lower()


def _path() -> Path | None:
    package = importlib.util.find_spec("sae_lens")
    folders = (package.submodule_search_locations or []) if package is not None else []
    path = next((Path(folder) / _FILE_NAME for folder in folders), None)
    return path if path is not None and path.is_file() else None


@functools.cache
def _registry() -> dict[str, Any]:
    path = _path()
    if path is None:
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
