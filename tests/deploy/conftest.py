from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"


def find_tool(name: str) -> str:
    """The path of a program, in this environment or anywhere; the test is skipped without it."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    path = shutil.which(name, path=folders)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """`find_tool`."""
    return find_tool


def read_yaml(path: Path) -> Any:
    """The only document of a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def free_port() -> str:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
