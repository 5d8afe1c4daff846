"""The demo command's own decisions; the demo itself is run from a clean clone by hand."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from rich.console import Console

from server.commands.demo import (
    MODEL_NAME,
    DemoError,
    api_key,
    demo,
    show,
    show_studio,
    studio_setup,
)


def test_a_taken_port_is_refused_rather_than_somebody_elses_server_asked(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.commands.demo.ensure_demo_model", lambda: "unused")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo(["--port", str(port)]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "environment", "key"),
    [
        ([], {}, None),
        ([], {"VLLM_API_KEY": "e"}, "e"),
        ([], {"VLLM_API_KEY": ""}, None),
        (["--api-key", "a", "b", "--port", "1"], {"VLLM_API_KEY": "e"}, "a"),
        (["--api-key=a=1"], {}, "a=1"),
        (["--api_key", "a"], {}, "a"),
        (["--api-key", "a", "--api-key", "b"], {}, "b"),
    ],
)
def test_key_is_the_flags_or_else_the_environments(
    flags: list[str], environment: dict[str, str], key: str | None
) -> None:
    assert api_key(flags, environment) == key


class Guarded(BaseHTTPRequestHandler):
    """One model, under a name that flags have given it, for those who bring the key."""

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "mine", "object": "model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert request["model"] == "mine"
        message = {"role": "assistant", "content": "I am [/bold] well"}
        self.answer({"choices": [{"index": 0, "message": message}]})

    def answer(self, body: dict[str, Any]) -> None:
        allowed = self.headers["Authorization"] == "Bearer sesame"
        content = json.dumps(body if allowed else {"error": "Unauthorized"}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def guarded() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_demo_asks_with_the_key_and_for_the_model_that_is_served(guarded: str) -> None:
    out = io.StringIO()
    show(guarded, "sesame", Console(file=out, width=200))
    printed = out.getvalue()
    assert printed.count("I am [/bold] well") == 3
    assert '"model": "mine"' in printed
    assert '-H "Authorization: Bearer $VLLM_API_KEY"' in printed
    assert "sesame" not in printed


def test_server_that_refuses_the_demo_is_one_line(guarded: str) -> None:
    with pytest.raises(DemoError, match=r"^cannot ask the server: AuthenticationError: ") as died:
        show(guarded, None, Console(file=io.StringIO()))
    assert "\n" not in str(died.value)


def test_demo_says_where_the_studio_is_and_links_to_what_it_asks() -> None:
    out = io.StringIO()
    show_studio("http://localhost:8123", [], Console(file=out, force_terminal=True, width=40))
    assert "http://localhost:8123/studio\x1b" in out.getvalue()
    link = re.search(r"http://localhost:8123/studio#setup=([^\x1b\s]+)", out.getvalue())
    assert link and json.loads(unquote(link[1])) == studio_setup()


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--no-steering-studio"], False),
        (["--no_steering_studio"], False),
        (["--no-steering-studio", "--steering-studio"], True),
    ],
)
def test_demo_names_no_studio_that_is_not_served(flags: list[str], shown: bool) -> None:
    out = io.StringIO()
    show_studio("http://localhost:8123", flags, Console(file=out))
    assert ("/studio" in out.getvalue()) is shown


def test_first_request_of_the_readme_names_the_model_that_the_demo_serves() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    named = re.search(r'"model": "([^"]+)"', readme)
    assert named is not None
    assert named[1] == MODEL_NAME
