"""SAEs on the Hugging Face hub: `hf://OWNER/REPO[/SUBFOLDER][@REVISION]`.

Only the files of one SAE are fetched, all of one commit, into the hub's own cache. If the hub
cannot be reached, or HF_HUB_OFFLINE is set, the cache answers. HF_ENDPOINT, HF_HOME and HF_TOKEN
mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae.errors import SAEError
from sae.files import (
    CHECKPOINT,
    CHECKPOINTS,
    RUN_CONFIG,
    SPARSIFY_WEIGHTS,
    choose_weights,
    companions,
    is_weight_file,
    layers_of,
    refuse_unreadable,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"

_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]+?))?/?(?:@(?P<revision>[^@]+))?")


@dataclass(frozen=True)
class HubAddress:
    """A repository, a path in it ("" for its root), and a revision ("" for the default one)."""

    repo: str
    path: str = ""
    revision: str = ""

    @classmethod
    def parse(cls, source: str) -> HubAddress:
        """Read `hf://OWNER/REPO[/SUBFOLDER][@REVISION]`. Raises SAEError if it is anything else."""
        match = _ADDRESS.fullmatch(source.removeprefix(SCHEME))
        if match is None:
            raise SAEError(f"{source}: expected hf://OWNER/REPO[/SUBFOLDER][@REVISION]")
        path = match["path"] or ""
        if any(part in ("", ".", "..") for part in path.split("/")) and path:
            raise SAEError(f"{source}: {path!r} is not a path in a repository")
        # What describes these weights lies a folder up.
        path = f"/{path}".removesuffix(f"/{CHECKPOINT}").lstrip("/")
        return cls(match["repo"], path, match["revision"] or "")

    @property
    def may_name_a_file(self) -> bool:
        """Whether its last part may be a file; only a listing tells.

        Folders have been published under names such as `v5_32k_layer_0.pt`, too.
        """
        return is_weight_file(self.name)

    @property
    def parent(self) -> str:
        """The path without its last part."""
        return self.path.rpartition("/")[0]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class _Folder:
    """A folder's path in the repository, and what it holds, relative to it.

    The name of a folder in it ends in a slash, which keeps it from being taken for a weight file;
    what lies in such a folder may be there too. `asked_for` is the file that the address names,
    None if it names the folder.
    """

    path: str
    names: frozenset[str]
    asked_for: str | None = None

    def choose(self, source: str, layer: int | None) -> str:
        """The name of the weight file. Raises SAEError if there is none, or several."""
        if self.asked_for is None:
            return choose_weights(source, self.names, layer, self.path)
        if self.asked_for not in self.names:
            raise SAEError(
                f"{source}: no file {_join(self.path, self.asked_for)!r} in the repository"
            )
        refuse_unreadable(source, self.asked_for)
        return self.asked_for


def fetch(source: str, layer: int | None = None) -> Path:
    """Fetch one SAE's files and return the path of its weight file in the hub's cache.

    Args:
        source: with `hf://`.
        layer: which of a set of layers.

    Raises:
        SAEError: if they cannot be fetched, or it is not clear which file is meant.
    """
    address = HubAddress.parse(source)
    try:
        commit, folder = _look(address)
    except SAEError:
        raise
    # What a hub that cannot be reached raises depends on the version of its client.
    except Exception as error:
        snapshot, folder = _cached(source, address, error)
        return Path(snapshot, folder.path, folder.choose(source, layer))
    weights = folder.choose(source, layer)
    wanted = {weights, *folder.names.intersection(companions(weights))}
    paths = {name: _download(source, address, _join(folder.path, name)) for name in sorted(wanted)}
    if weights == SPARSIFY_WEIGHTS and address.path and folder.path:
        _download_if_there(address, _join(folder.path.rpartition("/")[0], RUN_CONFIG))
    if any(commit not in path.parts for path in paths.values()):
        raise SAEError(f"{source}: the repository changed while it was fetched; try again")
    return paths[weights]


def layers(source: str) -> list[int]:
    """The layers of a folder that is a set of them, ascending; none if it is no such set.

    Raises:
        SAEError: if the hub refuses, or cannot be reached and the cache does not have the folder.
    """
    address = HubAddress.parse(source)
    try:
        _, folder = _look(address)
    except SAEError:
        raise
    except Exception as error:  # as above
        _, folder = _cached(source, address, error)
    return [] if folder.asked_for is not None else [*layers_of(folder.path, folder.names)]


def _look(address: HubAddress) -> tuple[str, _Folder]:
    """The commit, and the folder that the address names or that its file lies in."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    where = f"{SCHEME}{address.repo}"
    try:
        commit = api.repo_info(address.repo, revision=address.revision or None).sha
        assert commit is not None
        return commit, _list(api, address, commit)
    except GatedRepoError as error:
        raise SAEError(
            f"{where}: access is gated; accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise SAEError(
            f"{where}: no such repository, or a private one that needs HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise SAEError(f"{where}: no revision {address.revision!r}") from error
    except HFValidationError as error:
        raise SAEError(f"{where}: {error}") from error


def _list(api: HfApi, address: HubAddress, commit: str) -> _Folder:
    if address.may_name_a_file:
        names = _names(api, address.repo, commit, address.parent)
        if f"{address.name}/" not in names:
            return _Folder(address.parent, names, asked_for=address.name)
    names = _names(api, address.repo, commit, address.path)
    if f"{CHECKPOINTS}/" in names:
        inside = _names(api, address.repo, commit, _join(address.path, CHECKPOINTS))
        names |= {_join(CHECKPOINTS, name) for name in inside}
    return _Folder(address.path, names)


def _names(api: HfApi, repo: str, commit: str, folder: str) -> frozenset[str]:
    from huggingface_hub import RepoFolder
    from huggingface_hub.errors import EntryNotFoundError

    try:
        entries = list(api.list_repo_tree(repo, path_in_repo=folder or None, revision=commit))
    except EntryNotFoundError as error:
        raise SAEError(f"{SCHEME}{repo}: no folder {folder!r}") from error
    return frozenset(
        entry.path.rpartition("/")[2] + "/" * isinstance(entry, RepoFolder) for entry in entries
    )


def _download(source: str, address: HubAddress, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        # Asked for by its name, a revision is recorded in the cache and found there when offline.
        return Path(hf_hub_download(address.repo, file, revision=address.revision or None))
    # As above; a disk raises errors of its own, too.
    except Exception as error:
        raise SAEError(f"{source}: fetching {file} failed: {error}") from error


def _download_if_there(address: HubAddress, file: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(address.repo, file, revision=address.revision or None)
    except EntryNotFoundError:
        return
    except Exception as error:
        raise SAEError(f"{SCHEME}{address.repo}: fetching {file} failed: {error}") from error


def _cached(source: str, address: HubAddress, reason: Exception) -> tuple[Path, _Folder]:
    """Where an earlier fetch of the same revision lies, and the folder in it."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        repos = frozenset()
    for repo in repos:
        if repo.repo_id != address.repo or repo.repo_type != "model":
            continue
        for revision in repo.revisions:
            names = {"main"} if not address.revision else {address.revision}
            if not names & {revision.commit_hash, *revision.refs}:
                continue
            files = {
                file.file_path.relative_to(revision.snapshot_path).as_posix()
                for file in revision.files
            }
            return Path(revision.snapshot_path), _look_among(address, files)
    raise SAEError(
        f"{source}: the hub cannot be reached and the files are not in the cache: {reason}"
    ) from reason


def _look_among(address: HubAddress, files: Collection[str]) -> _Folder:
    """The same folder as `_list` finds, among all the files that the cache holds of a commit."""

    def inside(folder: str) -> frozenset[str]:
        prefix = _join(folder, "")
        return frozenset(file.removeprefix(prefix) for file in files if file.startswith(prefix))

    names = inside(address.path)
    if address.may_name_a_file and not names:
        return _Folder(address.parent, inside(address.parent), asked_for=address.name)
    return _Folder(address.path, names)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
