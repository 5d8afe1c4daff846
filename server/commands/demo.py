"""`vllm-sae demo`: serve the model and SAE that come along, and ask one thing in three ways."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.style import Style
from rich.text import Text

import sae
from server.commands.demo_model import DemoModelError, ensure_demo_model

DEMO_SAE: Final = Path(sae.__file__).parent / "demo" / "smollm2-135m-l14"
MODEL_NAME: Final = "smollm2-135m-instruct"
SAE_NAME: Final = "l14"
DEFAULT_PORT: Final = 8000
#: Seconds until the server must answer; a slow machine compiles and loads for minutes.
START_TIMEOUT: Final = 900.0
LOG_LINES_SHOWN: Final = 20

PROMPT: Final = "What did you do yesterday?"
ANSWER_TOKENS: Final = 90
#: Greedy text of this small model repeats itself unless repetition costs something.
SAMPLING: Final[dict[str, Any]] = {"temperature": 0, "max_tokens": ANSWER_TOKENS}
REPETITION_PENALTY: Final = 1.15

#: Left alone, this model offers its services as an assistant. Attribution finds that these four
#: features carry that, and music is one of the labelled features that steer best; both were
#: measured by tests/bench/steering_effect.py.
_ASSISTANT: Final = (3406, 2591, 645, 327)
_MUSIC: Final = 2417

WAYS: Final[dict[str, list[dict[str, Any]]]] = {
    "as it is": [],
    "assistant suppressed": [
        {"feature": feature, "op": "clamp", "value": 0} for feature in _ASSISTANT
    ],
    "music amplified": [{"feature": _MUSIC, "op": "clamp", "value": 1, "unit": "max_act"}],
}
AMPLIFIED: Final = "music amplified"


class DemoError(RuntimeError):
    """The demo cannot go on; the message is for the user."""


def demo(flags: Sequence[str]) -> int:
    """Serve, ask, show, and stay up until Ctrl-C.

    Args:
        flags: any flags of `vllm serve`, handed on.

    Returns:
        The exit code: 0, or 2 if the demo could not start or its server ended by itself.
    """
    console = Console()
    try:
        with phase(console, "preparing the model (the first time takes a minute)"):
            model = ensure_demo_model()
        with _serving(model, flags, console) as (base_url, process):
            show_studio(base_url, flags, console)
            show(base_url, api_key(flags, os.environ), console)
            console.print("\nServing until Ctrl-C.")
            show_studio(base_url, flags, console)
            raise DemoError(f"the server ended by itself, exit code {process.wait()}")
    except (DemoModelError, DemoError) as error:
        print(f"vllm-sae: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


@contextmanager
def phase(console: Console, what: str) -> Iterator[None]:
    """Show what is going on and for how long; a line with the seconds that it took stays."""
    begun = time.monotonic()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(what, total=None)
            yield
    else:
        console.print(f"{what} ...", soft_wrap=True, highlight=False, markup=False)
        yield
    took = f"{what}: {time.monotonic() - begun:.0f} s"
    console.print(took, soft_wrap=True, highlight=False, markup=False)


def show_studio(base_url: str, flags: Sequence[str], console: Console) -> None:
    """Print where the studio is, if it is served; a terminal's link opens what the demo asks."""
    if _without_studio(flags):
        return
    address = f"{base_url}/studio"
    filled_in = f"{address}#setup={quote(json.dumps(studio_setup()))}"
    console.print(Text("The studio: ").append(address, Style(link=filled_in)), soft_wrap=True)


def studio_setup() -> dict[str, Any]:
    """What the demo asks, as the studio's links hold it (server/studio/state.js)."""
    columns = [edits for edits in WAYS.values() if edits]
    return {
        "prompt": PROMPT,
        "sampling": {**SAMPLING, "repetition_penalty": REPETITION_PENALTY},
        "columns": [
            {"name": name, "edits": edits} for name, edits in zip("AB", columns, strict=True)
        ],
        "colour": {"sae": SAE_NAME, "feature": _MUSIC},
    }


def show(base_url: str, key: str | None, console: Console) -> None:
    """Ask the server the same thing in each way and print the answers side by side.

    Raises:
        DemoError: if the server does not answer as it should.
    """
    from openai import OpenAI, OpenAIError

    # The client insists on a key; a server without one takes any.
    client = OpenAI(base_url=f"{base_url}/v1", api_key=key or "none", timeout=START_TIMEOUT)
    panels = []
    try:
        model = client.models.list().data[0].id  # as the user's flags may have named it
        for way, interventions in WAYS.items():
            with phase(console, f"asking: {way}"):
                answer = Text(ask(client, model, interventions))
                panels.append(Panel(answer, title=way, width=_width(console)))
    except OpenAIError as error:
        said = " ".join(str(error).split())
        raise DemoError(f"cannot ask the server: {type(error).__name__}: {said:.500}") from error
    console.print(f"[bold]{PROMPT}[/bold]")
    console.print(Columns(panels))
    console.print("Try more:\n", end="")
    line = curl(base_url, model, with_key=key is not None)
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def ask(client: Any, model: str, interventions: list[dict[str, Any]]) -> str:
    """One answer of the model, steered by these edits."""
    extra: dict[str, Any] = {"repetition_penalty": REPETITION_PENALTY}
    if interventions:
        extra["steering"] = {"interventions": interventions}
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        extra_body=extra,
        **SAMPLING,
    )
    return str(answer.choices[0].message.content).strip()


def curl(base_url: str, model: str, *, with_key: bool) -> str:
    """A command line that sends the amplified request and asks for a report."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        **SAMPLING,
        "repetition_penalty": REPETITION_PENALTY,
        "steering": {"interventions": WAYS[AMPLIFIED], "report": True},
    }
    # The shell puts the key in: a secret is not for the screen.
    key = '-H "Authorization: Bearer $VLLM_API_KEY" ' if with_key else ""
    return (
        f"curl {base_url}/v1/chat/completions -H 'Content-Type: application/json' {key}"
        f"-d {shlex.quote(json.dumps(body))}"
    )


def api_key(flags: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """A key that a server with these flags asks for; None if it asks for none."""
    return _value(flags, "--api-key") or environment.get("VLLM_API_KEY") or None


@contextmanager
def _serving(
    model: Path, flags: Sequence[str], console: Console
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server in a process of its own; once it answers, yield its base URL and process."""
    port = _port(flags)
    _refuse_taken(port)
    command = [
        *(sys.executable, "-m", "server", "serve", str(model)),
        *("--sae", f"{SAE_NAME}={DEMO_SAE}", "--served-model-name", MODEL_NAME),
        # On float32 the answers are the same on every machine, or nearly.
        *("--dtype", "float32", "--max-model-len", "2048", *flags),
    ]
    # What vLLM reserves for its cache on a CPU by default is more than this model can use.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with tempfile.NamedTemporaryFile(prefix="vllm-sae-demo-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    for stop in (signal.SIGINT, signal.SIGTERM):  # also where a shell had us ignore Ctrl-C
        signal.signal(stop, _interrupt)
    try:
        with phase(console, f"starting the server, log in {log.name}"):
            _wait_until_ready(process, f"http://localhost:{port}", Path(log.name))
        yield f"http://localhost:{port}", process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], base_url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
            raise DemoError("\n".join(["the server did not start:", *last]))
        try:
            if httpx.get(f"{base_url}/health").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(1.0)
    raise DemoError(f"the server did not answer within {START_TIMEOUT:.0f} s, see {log}")


def _refuse_taken(port: int) -> None:
    """Raises DemoError if the port is taken: what answers there would be another server."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise DemoError(f"port {port} is taken; choose another with --port") from error


def _port(flags: Sequence[str]) -> int:
    """The value of `--port` among vLLM's flags. Raises DemoError if it is no number."""
    text = _value(flags, "--port")
    if text is None:
        return DEFAULT_PORT
    if not text.isdecimal():
        raise DemoError(f"--port: expected a number, got {text!r}")
    return int(text)


def _without_studio(flags: Sequence[str]) -> bool:
    """Whether the last of these flags that says so leaves the studio out."""
    said = [flag.replace("_", "-") for flag in flags]
    choices = [flag for flag in said if flag in ("--steering-studio", "--no-steering-studio")]
    return choices[-1:] == ["--no-steering-studio"]


def _value(flags: Sequence[str], name: str) -> str | None:
    """The value of one of vLLM's flags, the last one given; None if it is not given."""
    found = None
    for i, flag in enumerate(flags):
        word, equals, value = flag.partition("=")
        if word.replace("_", "-") == name:
            found = value if equals else "".join(flags[i + 1 : i + 2])
    return found


def _width(console: Console) -> int:
    """The width of one of the panels that stand side by side."""
    return max(24, console.width // len(WAYS) - 1)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
