"""Zip archives, which npz files and those of torch.save are."""

from __future__ import annotations

import zipfile
from pathlib import Path

from sae.errors import SAEError


def archive_members(path: Path) -> list[zipfile.ZipInfo]:
    """The entries of an archive's directory. Raises SAEError if it is truncated or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    # NotImplementedError is zipfile's for a member that needs a later version of the zip format,
    # which in a weight file is a damaged byte.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise SAEError(f"{path}: truncated or damaged archive: {error}") from error
