"""Clients of the OpenAI API as they come, against one real server.

They live in environments of their own, which `make test-clients` makes: they do not agree on
versions, neither with vLLM nor with each other. What is not installed there is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.demo_sae import ELVES, ELVES_MAX_ACTIVATION
from tests.engine.server import MODEL, LiveServer, serving

#: An environment of Python's for each group of clients, and npm's packages.
CLIENTS: Final = Path(os.environ.get("STEERING_CLIENTS", Path(sys.prefix) / "clients"))
HERE: Final = Path(__file__).parent

PRESET: Final = "elvish"
EDIT: Final = {"sae": "l14", "feature": ELVES, "op": "clamp", "value": 1.5 * ELVES_MAX_ACTIVATION}
STEERING: Final[dict[str, Any]] = {"interventions": [EDIT], "report": True}
QUESTION: Final = "Tell me about your day."
MAX_TOKENS: Final = 16
#: Seconds that one client may take: some import for a minute on a busy machine.
CLIENT_TIMEOUT: Final = 280.0
#: A port that nobody listens at.
DISCARD: Final = 9

#: What keeps clients from calling home, and a hub.
QUIET: Final = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "PROMPTFOO_DISABLE_REMOTE_GENERATION": "1",
    "PROMPTFOO_DISABLE_TELEMETRY": "1",
    "PROMPTFOO_DISABLE_UPDATE": "1",
}


@dataclass
class Clients:
    """How clients are run: quiet, and kept on this machine.

    Attributes:
        served: the server that they talk to.
        folder: theirs to write into.
    """

    served: LiveServer
    folder: Path

    @property
    def base_url(self) -> str:
        return f"{self.served.base_url}/v1"

    @property
    def environment(self) -> dict[str, str]:
        """With nobody's keys or settings, and a guard against calls to elsewhere."""
        guard = HERE / "guard"
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(guard),
            "NODE_OPTIONS": f"--require={guard / 'guard.cjs'}",
            "NODE_PATH": str(CLIENTS / "node_modules"),
            "STEERING_CLIENT_CALLS": str(self._calls),
            "PROMPTFOO_CONFIG_DIR": str(self.folder / "promptfoo"),
            "OMP_NUM_THREADS": "1",
            # promptfoo sends an event that its telemetry is off, whatever is set.
            "HTTPS_PROXY": f"http://127.0.0.1:{DISCARD}",
            "NO_PROXY": "127.0.0.1",
            **QUIET,
        }

    @property
    def _calls(self) -> Path:
        return self.folder / "calls.txt"

    def run(self, *command: str | Path, cwd: Path | None = None, code: int = 0) -> str:
        """What a client printed; that it stayed on this machine is checked, and its exit code."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLIENT_TIMEOUT,
        )
        assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
        self.assert_stayed()
        return done.stdout

    def assert_stayed(self) -> None:
        """No client has tried to reach another machine."""
        assert not self._calls.exists(), self._calls.read_text()

    def program(self, interpreter: str | Path, name: str, **more: Any) -> dict[str, Any]:
        """What one of our programs found, its last line."""
        asked = {
            "base_url": self.base_url,
            "base": MODEL,
            "preset": PRESET,
            "steering": STEERING,
            "question": QUESTION,
            "max_tokens": MAX_TOKENS,
            "folder": str(self.folder),
            **more,
        }
        printed = self.run(interpreter, HERE / "programs" / name, json.dumps(asked))
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found

    def answers(self) -> tuple[str, str]:
        """What the server says to the question, unsteered and steered, asked without a client."""
        texts = []
        for steering in (None, STEERING):
            answer = self.served.chat(QUESTION, steering, max_tokens=MAX_TOKENS)
            assert answer.status_code == 200, answer.text
            texts.append(answer.json()["choices"][0]["message"]["content"])
        assert texts[0] != texts[1]
        return texts[0], texts[1]


def python(group: str) -> Path:
    """The interpreter of a group of clients."""
    return CLIENTS / group / "bin" / "python"


def need(package: str) -> None:
    """Skip where a folder of packages (`GROUP/PACKAGE`, `npm/PACKAGE`) is not installed."""
    group, _, name = package.partition("/")
    found = (
        (CLIENTS / "node_modules" / name).exists() and shutil.which("node")
        if group == "npm"
        else [*(CLIENTS / group).glob(f"lib/python*/site-packages/{name}")]
    )
    if not found:
        pytest.skip(f"{name} is not installed in {CLIENTS}: make test-clients")


@pytest.fixture(scope="session")
def served(
    demo_model: Path, demo_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """SmolLM2 with a preset."""
    folder = tmp_path_factory.mktemp("served")
    file = folder / "elvish.json"
    file.write_text(json.dumps({"interventions": [EDIT]}))
    flags = ("--no-steering-self-check", "--steering-preset", f"{PRESET}={file}")
    with serving(demo_model, {"l14": demo_sae}, folder / "server.log", *flags) as running:
        yield running


@pytest.fixture
def clients(request: pytest.FixtureRequest, tmp_path: Path) -> Clients:
    """The server is started for the first client that is installed."""
    for marker in request.node.iter_markers("needs"):
        need(*marker.args)
    return Clients(request.getfixturevalue("served"), tmp_path)


def assert_answers(found: Mapping[str, Any], expected: tuple[str, str], preset: str) -> None:
    """A client's answers are the server's own, whichever way it asked."""
    base, steered = expected
    assert found["base"] == base
    for way in ("preset", "field", "streamed", "field streamed", "response"):
        assert found.get(way, steered) == steered, way
    assert found["model"].endswith(preset)
