"""The demo command's own decisions; the demo itself is run from a clean clone by hand."""

from __future__ import annotations

import socket

import pytest

from server.demo import demo


def test_a_taken_port_is_refused_rather_than_somebody_elses_server_asked(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.demo.ensure_demo_model", lambda: "unused")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo(["--port", str(port)]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err
