"""The threat model names tests, and they are there."""

from __future__ import annotations

import re

import pytest

from tests.deploy.conftest import DEPLOY, REPOSITORY

NAMED = re.findall(
    r"`(tests/[\w/]+\.py)::(\w+)`", (DEPLOY / "SECURITY.md").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[name for _, name in NAMED])
def test_named_test_exists(path: str, name: str) -> None:
    source = (REPOSITORY / path).read_text(encoding="utf-8")
    assert re.search(rf"^(?:async )?def {name}\(", source, flags=re.MULTILINE)
