from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sae.sae import SAE, open_sae
from sae.source import SAEReference
from tests.sae import oracles


@pytest.fixture
def load() -> Callable[..., SAE]:
    """Open a path as `--sae l3=PATH` would, with what the flag states beside it."""

    def open_path(path: Path, **stated: str) -> SAE:
        options = "".join(f",{key}={value}" for key, value in stated.items())
        return open_sae(SAEReference.parse(f"l3={path}{options}"))

    return open_path


@pytest.fixture
def quiet() -> Iterator[None]:
    """What the libraries of the formats warn and print is left out, and no gradients are kept."""
    with oracles.quiet():
        yield
