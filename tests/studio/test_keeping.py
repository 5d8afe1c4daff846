"""What the studio keeps: presets, copies, links and history, each in its place."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from tests.engine.server import LiveServer
from tests.studio.conftest import KEY, Heard, OpenStudio
from tests.studio.page import (
    EDIT,
    MUSIC,
    MUSIC_MAX,
    PROMPT,
    SAMPLING,
    answer,
    ask,
    setup,
)

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

# The first test waits for the server, too.
pytestmark = pytest.mark.timeout(700)


def test_column_is_saved_as_a_preset_opened_and_deleted(
    open_studio: OpenStudio, server: LiveServer
) -> None:
    page = open_studio(setup([EDIT]))
    page.click("#tab-keep")
    page.fill("#preset-name", "not a name")
    page.get_by_role("button", name="Save this column").click()
    page.locator("#kept.error", has_text="A-Za-z0-9").wait_for()
    assert page.locator("#preset-name").get_attribute("aria-invalid") == "true"
    page.fill("#preset-name", "musical")
    page.fill("#preset-description", "sings")
    page.get_by_role("button", name="Save this column").click()
    page.get_by_text("Saved: requests may now name “musical”").wait_for()
    kept = server.client.get("/v1/steering/presets/musical").json()
    assert (kept["steering"], kept["description"]) == ({"interventions": [EDIT]}, "sings")
    page.get_by_role("button", name="Open musical as a column").click()
    assert "music (mostly" in page.locator("[data-column='B'] .edit").inner_text()
    page.get_by_role("button", name="Delete musical").click()
    page.get_by_text("Deleted “musical”.").wait_for()
    assert server.client.get("/v1/steering/presets/musical").status_code == 404


def test_copied_curl_python_and_preset_do_what_the_column_does(
    open_studio: OpenStudio, server: LiveServer, tmp_path: Path
) -> None:
    prompt = "It's \"mine\" — isn't it?\n$HOME `x`"
    page = open_studio(setup([EDIT], prompt=prompt, sampling={**SAMPLING, "max_tokens": 4}))
    page.click("#tab-keep")
    environment = {**os.environ, "VLLM_API_KEY": KEY}

    def copied(kind: str) -> str:
        page.click(f"#copy-{kind}")
        page.locator("#kept", has_text=re.compile("^(Copied|Selected)")).wait_for()
        text: str = page.evaluate("document.getElementById('copied').textContent")
        assert KEY not in text
        return text

    def run(command: list[str]) -> str:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    answered = json.loads(run(["bash", "-c", copied("curl")]))
    (entry,) = answered["steering"]["interventions"]
    assert (entry["feature"], entry["effective_value"]) == (MUSIC, MUSIC_MAX)
    content = answered["choices"][0]["message"]["content"]
    # The client alone, from wherever it is installed: not this repository.
    printed = run([sys.executable, "-c", copied("python")])
    assert content in printed and f"'feature': {MUSIC}" in printed
    preset = json.loads(copied("file"))
    put = server.client.put("/v1/steering/presets/copied", json=preset)
    assert put.status_code == 201, put.text
    assert put.json()["steering"] == {"interventions": [EDIT]}
    server.client.delete("/v1/steering/presets/copied")


def test_link_holds_the_whole_set_up_and_is_sent_to_nobody(
    open_studio: OpenStudio, heard: Heard, context: BrowserContext, server: LiveServer
) -> None:
    page = open_studio(setup([EDIT], [{**EDIT, "op": "cap", "value": 0.5}], system="Be brief."))
    page.fill("#prompt", "Größe & <b>quetzal</b>?")
    page.click("#tab-keep")
    page.click("#copy-link")
    link: str = page.evaluate("document.getElementById('copied').textContent")
    assert KEY not in link
    before = page.evaluate("sessionStorage.getItem('vllm-sae-studio-setup')")
    page.close()

    other = context.new_page()
    other.add_init_script(f"sessionStorage.setItem('vllm-sae-studio-key', '{KEY}')")
    other.goto(link)
    other.locator("[data-column='B'] .edit").wait_for()
    assert other.locator("#prompt").input_value() == "Größe & <b>quetzal</b>?"
    assert other.locator("#system").input_value() == "Be brief."
    assert json.loads(other.evaluate("sessionStorage.getItem('vllm-sae-studio-setup')")) == (
        json.loads(before)
    )
    assert other.evaluate("location.hash") == ""
    # Fragments stay in the browser: the server's log of what was asked for has nothing of it.
    log = server.log.read_text()
    assert "GET /studio" in log and "quetzal" not in log
    assert not any("/completions" in request.url for request in heard.requests)


def test_broken_link_leaves_the_page_as_it_was(open_studio: OpenStudio, server: LiveServer) -> None:
    page = open_studio(setup([EDIT]))
    columns = quote(json.dumps({"columns": [{"name": "A", "edits": [7, {"feature": -1}]}, 9]}))
    for fragment in ("%", "null%", "%7B%22columns%22%3A"):
        page.goto(f"{server.base_url}/studio#setup={fragment}")
        page.wait_for_function("location.hash === ''")
        assert page.locator("[data-column='A'] .edit").count() == 1
    # What can be read of it is taken up.
    for fragment, edits in (("[]", 0), (columns, 0), (quote('{"prompt": 5}'), 0)):
        page.goto(f"{server.base_url}/studio#setup={fragment}")
        page.wait_for_function("location.hash === ''")
        assert page.locator("[data-column='A'] .edit").count() == edits
        assert page.locator("#prompt").input_value() == PROMPT


def test_history_is_kept_in_the_tab_and_restores_a_set_up(
    open_studio: OpenStudio, context: BrowserContext
) -> None:
    page = open_studio(setup([EDIT], sampling={**SAMPLING, "max_tokens": 4}))
    ask(page)
    said = answer(page, "A")
    page.fill("#prompt", "Another question")
    page.get_by_role("button", name=f"Remove feature {MUSIC}").click()
    page.reload()
    page.locator("#results li").first.wait_for()
    assert page.locator("#prompt").input_value() == "Another question"
    page.click("#tab-history")
    page.locator("#history summary").click()
    assert said in page.locator("#history").inner_text()
    page.get_by_role("button", name="Set up like this").click()
    assert page.locator("#prompt").input_value() == PROMPT
    assert page.locator("[data-column='A'] .edit").count() == 1
    assert page.evaluate("localStorage.length") == 0
    assert context.cookies() == []
    page.click("#clear-history")
    page.get_by_text("Nothing was asked yet.").wait_for()
