"""The README's examples: its request is answered in the shape that it shows, its code is code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.server import MODEL, LiveServer

pytest_plugins = ("tests.engine.server",)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    path
    for folder in ("", "sae", "server", "steering", "deploy", "tests/engine", "tests/bench")
    for path in (ROOT / folder).glob("*.md")
)


def shape(value: Any) -> Any:
    """Names of members and types of values; lists by their first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return type(value)


def test_request_of_the_first_screen_is_answered_as_shown(live_server: LiveServer) -> None:
    command, answer = re.findall(r"```(?:console|json)\n(.*?)```", README, re.DOTALL)[:2]
    body = json.loads(re.search(r"-d '(.*)'", command, re.DOTALL)[1])  # type: ignore[index]
    # The README's server is the demo's, which has one SAE and another name for its model.
    body["model"] = MODEL
    (edit,) = body["steering"]["interventions"]
    edit["sae"] = "l14"
    response = httpx.post(f"{live_server.base_url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    shown = json.loads(answer)
    found = response.json()
    assert shape(found["steering"]) == shape(shown["steering"])
    assert found["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_of_the_readme_compiles(code: str) -> None:
    compile(code, "README.md", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading and file.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in slugs, target
