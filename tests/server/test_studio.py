"""The studio's files: where they are served, and what browsers are told about them."""

from __future__ import annotations

import re
import tomllib
from argparse import ArgumentParser
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import pytest

from server.routes.studio import PAGE
from server.start.flags import ServerOptions, add_flags
from tests.server.conftest import Server, StartServer

ON = {"steering_studio": True}
FILES = sorted(file.name for file in PAGE.iterdir())
#: What the page asks for by name; its markup and its style are one answer.
SERVED = [name for name in FILES if not name.endswith((".html", ".css"))]


@pytest.fixture
def studio(start: StartServer) -> Server:
    return start(options=ON)


def test_page_and_its_files_are_served_with_a_strict_policy(studio: Server) -> None:
    for path in ("/studio", *(f"/studio/{name}" for name in SERVED)):
        answer = studio.client.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy and "trusted-types 'none'" in policy
        assert not any("unsafe" in part or "http" in part or "*" in part for part in policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert studio.client.get("/studio").headers["content-type"] == "text/html; charset=utf-8"
    assert studio.client.get("/studio/app.js").headers["content-type"].startswith("text/javascript")


def test_without_the_flag_there_is_no_route(start: StartServer) -> None:
    for options in ({"steering_studio": False}, {}):
        server = start(options=options)
        assert server.client.get("/studio").status_code == 404
        assert server.client.get("/studio/app.js").status_code == 404
        routes = getattr(server.client.app, "routes", [])
        assert routes and not any("studio" in str(getattr(route, "path", "")) for route in routes)


@pytest.mark.parametrize(
    ("flags", "served"),
    [([], True), (["--steering-studio"], True), (["--no-steering-studio"], False)],
)
def test_flag_leaves_the_studio_out(start: StartServer, flags: list[str], served: bool) -> None:
    parser = ArgumentParser()
    add_flags(parser, routes=True)
    args = parser.parse_args(flags)
    assert ServerOptions.of(args).studio is served
    options = {"steering_studio": args.steering_studio}
    assert start(options=options).client.get("/studio").is_success is served


@pytest.mark.parametrize(
    "name",
    [
        *("../plugin.py", "..%2fplugin.py", "%2e%2e/plugin.py", "nothing.js", "", "app.js/x"),
        *("index.html", "studio.css"),
    ],
)
def test_nothing_but_its_own_files_is_served(studio: Server, name: str) -> None:
    answer = studio.client.get(f"/studio/{name}", follow_redirects=False)
    assert answer.status_code in (307, 404)
    assert "import" not in answer.text


def test_page_loads_without_the_key_and_what_it_asks_needs_one(start: StartServer) -> None:
    server = start("--api-key", "sesame", options=ON)
    assert server.client.get("/studio").status_code == 200
    scripts = "\n".join((PAGE / name).read_text() for name in FILES if name.endswith(".js"))
    asked = {*re.findall(r'["`](v1/[a-z_/]+)', scripts)}
    assert {"v1/models", "v1/saes", "v1/chat/completions", "v1/steering/presets"} <= asked
    for path in asked:
        for method in ("GET", "POST"):
            assert server.client.request(method, f"/{path}").status_code == 401, path


def test_no_script_makes_markup_of_a_text_or_names_another_host() -> None:
    """Trusted types forbid it in browsers that know them; this holds for all."""
    for name in FILES:
        text = (PAGE / name).read_text()
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function"
        assert not re.search(forbidden, text), name
        hosts = set(re.findall(r"https?://([\w.]+)", text))
        assert hosts <= {"www.w3.org"}, name  # the namespace of drawings


def test_page_is_whole_in_one_answer_and_its_policy_knows_its_style(studio: Server) -> None:
    answer = studio.client.get("/studio")
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, flags=re.DOTALL)
    assert style == (PAGE / "studio.css").read_text()
    hashed = b64encode(sha256(style.encode()).digest()).decode()
    policy = answer.headers["content-security-policy"].split("; ")
    assert f"style-src 'sha256-{hashed}'" in policy
    assert "stylesheet" not in answer.text


def test_page_has_no_inline_script_and_no_style_but_its_own(studio: Server) -> None:
    page = studio.client.get("/studio").text
    assert not re.search(r"\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    assert page.count("<style") == 1


def test_package_data_takes_every_file_of_the_page() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["server"]
    packed = {file.name for pattern in patterns for file in (root / "server").glob(pattern)}
    assert {*FILES} <= packed
