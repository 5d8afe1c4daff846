"""SAEs on the Hugging Face hub: `hf://OWNER/REPO[/SUBFOLDER][@REVISION]`.

Only the files of one SAE are fetched, all of one commit, into the hub's own cache. Where the hub
cannot be reached, or HF_HUB_OFFLINE is set, the cache answers. HF_ENDPOINT, HF_HOME and HF_TOKEN
mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sae.errors import SAEError
from sae.files import CHECKPOINT, CHECKPOINTS, choose_weights, companions, is_weight_file

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
        match = _ADDRESS.fullmatch(source.removeprefix(SCHEME))
        if match is None:
            raise SAEError(f"{source}: expected hf://OWNER/REPO[/SUBFOLDER][@REVISION]")
        path = match["path"] or ""
        if any(part in ("", ".", "..") for part in path.split("/")) and path:
            raise SAEError(f"{source}: {path!r} is not a path in a repository")
        # What describes these weights lies a folder up.
        path = path.removesuffix(CHECKPOINT).rstrip("/")
        return cls(match["repo"], path, match["revision"] or "")

    @property
    def names_a_file(self) -> bool:
        return is_weight_file(PurePosixPath(self.path).name)

    @property
    def folder(self) -> str:
        """The folder of the weights: the path itself, or the one a weight file lies in."""
        if not self.names_a_file:
            return self.path
        parent = str(PurePosixPath(self.path).parent)
        return "" if parent == "." else parent


def fetch(source: str) -> Path:
    """Fetch one SAE's files and return the path of its weight file in the hub's cache."""
    address = HubAddress.parse(source)
    try:
        commit, names = _list(address)
    except SAEError:
        raise
    # What a hub that cannot be reached raises depends on the version of its client.
    except Exception as error:
        return _cached(source, address, error)
    weights = _choose(source, address, names)
    wanted = {weights, *(name for name in companions(weights) if name in names)}
    paths = {name: _download(source, address, name) for name in sorted(wanted)}
    if any(commit not in path.parts for path in paths.values()):
        raise SAEError(f"{source}: the repository changed while it was fetched; try again")
    return paths[weights]


def _list(address: HubAddress) -> tuple[str, set[str]]:
    """The commit, and the names in the folder and in its checkpoints folder, relative to it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
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
        paths = _paths(api, address.repo, commit, address.folder)
        checkpoints = f"{address.folder}/{CHECKPOINTS}".lstrip("/")
        if checkpoints in paths:
            paths |= _paths(api, address.repo, commit, checkpoints)
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
    except EntryNotFoundError as error:
        raise SAEError(f"{where}: no folder {address.folder!r}") from error
    except HFValidationError as error:
        raise SAEError(f"{where}: {error}") from error
    return commit, {path.removeprefix(address.folder).lstrip("/") for path in paths}


def _paths(api: object, repo: str, commit: str, folder: str) -> set[str]:
    from huggingface_hub import HfApi

    assert isinstance(api, HfApi)
    tree = api.list_repo_tree(repo, path_in_repo=folder or None, revision=commit)
    return {entry.path for entry in tree}


def _choose(source: str, address: HubAddress, names: set[str]) -> str:
    if not address.names_a_file:
        return choose_weights(source, names)
    name = PurePosixPath(address.path).name
    if name not in names:
        raise SAEError(f"{source}: no file {address.path!r} in the repository")
    return name


def _download(source: str, address: HubAddress, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    file = f"{address.folder}/{name}".lstrip("/")
    try:
        # By its name, the revision is recorded in the cache and found there when offline.
        return Path(hf_hub_download(address.repo, file, revision=address.revision or None))
    # As above, and the disk has its own.
    except Exception as error:
        raise SAEError(f"{source}: fetching {file} failed: {error}") from error


def _cached(source: str, address: HubAddress, reason: Exception) -> Path:
    """The weight file from an earlier fetch of the same revision."""
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
            prefix = f"{address.folder}/" if address.folder else ""
            inside = {file.removeprefix(prefix) for file in files if file.startswith(prefix)}
            weights = _choose(source, address, inside)
            return Path(revision.snapshot_path, address.folder, weights)
    raise SAEError(
        f"{source}: the hub cannot be reached and the files are not in the cache: {reason}"
    ) from reason
