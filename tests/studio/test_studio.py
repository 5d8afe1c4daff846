"""The studio's manners in a real browser: keys, refusals, strangers' texts, keyboards, screens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engine.server import LiveServer
from tests.studio.conftest import HOSTILE, HOSTILE_FEATURE, KEY, Heard, OpenStudio
from tests.studio.page import (
    EDIT,
    MUSIC,
    PROMPT,
    SAMPLING,
    answer,
    ask,
    setup,
    tokens,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

# The first test waits for the server, too.
pytestmark = pytest.mark.timeout(700)


def violations(page: Page) -> list[str]:
    """Serious findings of axe-core."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:200]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def test_page_asks_for_the_key_and_without_it_every_call_is_refused(
    open_studio: OpenStudio, heard: Heard, server: LiveServer
) -> None:
    page = open_studio(setup([EDIT]), key=None)
    dialog = page.locator("#key-dialog")
    dialog.wait_for()
    assert page.locator("#prompt").input_value() == PROMPT  # the page itself needs no key
    assert page.locator("#key-error").is_hidden()
    page.fill("#key", "open")
    page.keyboard.press("Enter")
    page.get_by_text("The server refused this key.").wait_for()
    asked = [each for each in heard.responses if "/v1/" in each.url]
    assert asked and {each.status for each in asked} == {401}

    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.locator("#results li").first.wait_for()
    ask(page)
    assert answer(page, "A")
    stored = page.evaluate("[{...localStorage}, {...sessionStorage}]")
    assert stored[0] == {} and KEY in stored[1].values()
    assert KEY not in page.content()
    assert not any(KEY in each.url for each in heard.requests)
    page.click("#forget-key")
    assert page.evaluate("Object.values(sessionStorage)").count(KEY) == 0


def test_refused_field_is_marked_in_its_column_alone(open_studio: OpenStudio) -> None:
    wrong = {"sae": "l14", "feature": 5, "op": "clamp", "value": 2e6, "unit": "raw"}
    page = open_studio(setup([EDIT, wrong], [EDIT], sampling={**SAMPLING, "max_tokens": 3}))
    ask(page)
    column = page.locator("[data-column='A']")
    column.locator(".column-error", has_text="1000000").wait_for()
    marked = page.locator("[data-refused]")
    assert marked.count() == 1
    assert marked.get_attribute("data-field") == "value"
    assert marked.get_attribute("aria-invalid") == "true"
    assert column.locator("[data-edit='1'] [data-refused]").count() == 1
    assert answer(page, "B") and page.locator("[data-column='B'] .error:visible").count() == 0

    column.get_by_label("Value", exact=True).nth(1).fill("3")
    page.fill("#temperature", "-1")
    ask(page)
    assert page.locator("#temperature").get_attribute("aria-invalid") == "true"
    page.fill("#temperature", "0")
    ask(page)
    assert page.locator("[data-refused]").count() == 0
    assert page.locator(".error:visible").count() == 0


def test_page_says_when_the_server_is_gone_and_when_it_is_back(open_studio: OpenStudio) -> None:
    page = open_studio(setup([EDIT], sampling={**SAMPLING, "max_tokens": 3}))
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    ask(page)
    page.locator("#problem", has_text="does not answer").wait_for()
    assert "does not answer" in page.locator("[data-column='A'] .result .error").inner_text()
    page.unroute("**/v1/**")
    page.locator("#problem").wait_for(state="hidden")
    ask(page)
    assert answer(page, "A")


def test_labels_and_presets_of_strangers_are_texts(open_studio: OpenStudio) -> None:
    hostile = {"sae": "hostile", "feature": HOSTILE_FEATURE, "op": "ablate"}
    named = setup([hostile], prompt=HOSTILE, colour={"sae": "hostile", "feature": HOSTILE_FEATURE})
    named["sampling"] = {**SAMPLING, "max_tokens": 4}
    page = open_studio(named)
    page.locator("[data-column='A'] .edit", has_text="<img src=x").wait_for()
    page.select_option("#feature-sae", "hostile")
    page.fill("#query", "img")
    page.locator("#results .link", has_text=HOSTILE).click()
    page.locator("#feature-detail", has_text="Makes likelier").wait_for()
    ask(page)
    page.locator("[data-column='A'] .report", has_text="<img").wait_for()
    tokens(page, "A").nth(0).hover()
    page.click("#tab-keep")
    page.locator("#presets", has_text=HOSTILE).wait_for()
    page.fill("#preset-name", HOSTILE[:60])
    page.get_by_role("button", name="Save this column").click()
    page.locator("#kept.error", has_text="<img").wait_for()
    page.click("#copy-curl")
    page.click("#tab-history")
    page.locator("#history", has_text="<img").wait_for()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, svg, body script").count() == 0


def test_policy_stops_a_text_that_would_become_markup(
    open_studio: OpenStudio, heard: Heard
) -> None:
    page = open_studio()
    tried = """() => { try { document.body.innerHTML = "<b>x</b>"; return "ran"; }
                       catch (error) { return error.name; } }"""
    assert page.evaluate(tried) == "TypeError"
    assert [error for error in heard.errors if "TrustedHTML" in error] == heard.errors != []
    heard.errors.clear()


def test_all_of_it_is_reached_by_the_keyboard(open_studio: OpenStudio) -> None:
    page = open_studio(setup([], sampling={**SAMPLING, "max_tokens": 12}))
    page.locator("h1").click()
    page.keyboard.press("/")
    page.keyboard.type("mostly the word music")
    page.locator("#results li").nth(0).get_by_text("music (mostly").wait_for()
    page.wait_for_function("document.querySelectorAll('#results li').length === 1")
    focused = "document.activeElement.ariaLabel ?? document.activeElement.textContent"
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate(focused).startswith("Add music"):
            break
    page.keyboard.press("Enter")
    page.locator("[data-column='A'] .edit").wait_for()
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#stop:not([disabled])")
    page.wait_for_selector("#run:not([disabled])")
    page.locator("[data-column='A'] .result > .answer").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    panel = page.locator("#token-panel")
    panel.wait_for()
    # What the eye sees is said, too.
    page.wait_for_function("/: .+ [0-9]/.test(document.getElementById('spoken').textContent)")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('#token-panel') !== null")
    page.keyboard.press("Escape")
    assert panel.is_hidden()
    assert page.evaluate("document.activeElement.classList.contains('answer')")
    page.locator("#tab-features").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") in ("tab-studies", "tab-keep")


def test_axe_finds_nothing_serious_in_light_or_dark(open_studio: OpenStudio) -> None:
    page = open_studio(setup([EDIT], sampling={**SAMPLING, "max_tokens": 8}))

    def nothing_serious() -> None:
        for theme in ("light", "dark"):
            page.evaluate("(theme) => { document.documentElement.dataset.theme = theme; }", theme)
            assert violations(page) == []

    ask(page)
    for summary in page.locator("[data-column='A'] details:visible > summary").all():
        summary.click()
    tokens(page, "A").nth(3).hover()
    page.locator("#token-panel li").first.wait_for()
    nothing_serious()
    page.fill("#query", "music")
    page.locator("#results .link").first.click()
    page.locator("#feature-detail", has_text="Makes likelier").wait_for()
    nothing_serious()
    for tab in ("studies", "keep", "history"):
        page.click(f"#tab-{tab}")
        nothing_serious()
    page.click("#forget-key")
    nothing_serious()


def test_small_screen_has_no_sideways_scrolling(open_studio: OpenStudio) -> None:
    page = open_studio(setup([EDIT], [EDIT], [EDIT], sampling={**SAMPLING, "max_tokens": 2}))
    ask(page)
    page.locator("[data-column='A'] .edit summary").click()
    for width in (1440, 1000, 700, 340):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_jumps_while_the_page_loads_and_answers_come(open_studio: OpenStudio) -> None:
    page = open_studio(setup([EDIT], [EDIT], sampling={**SAMPLING, "max_tokens": 16}))
    ask(page)
    moved = page.evaluate(
        """() => new Promise((resolve) => {
          let sum = 0;
          new PerformanceObserver((list) => {
            for (const entry of list.getEntries()) if (!entry.hadRecentInput) sum += entry.value;
          }).observe({ type: "layout-shift", buffered: true });
          setTimeout(() => resolve(sum), 300);
        })"""
    )
    assert moved < 0.1  # what web vitals call good


def test_pictures_of_the_readme(open_studio: OpenStudio, tmp_path: Path) -> None:
    """Written to the folder that STUDIO_PICTURES names, to be looked at and kept."""
    assistant = {"sae": "l14", "feature": 3406, "op": "clamp", "value": 0, "unit": "raw"}
    colour = {"sae": "l14", "feature": MUSIC}
    page = open_studio(
        setup([EDIT], [assistant], colour=colour, sampling={**SAMPLING, "max_tokens": 48})
    )
    page.set_viewport_size({"width": 1440, "height": 1120})
    ask(page)
    page.fill("#query", "music")
    page.locator("#results li", has_text="Music, at the word").wait_for()
    page.locator("[data-column='A'] .result > .answer .token.active", has_text="resonates").hover()
    page.locator("#token-panel li").first.wait_for()
    picture = Path(os.environ.get("STUDIO_PICTURES", tmp_path)) / "studio.png"
    page.screenshot(path=picture)
    assert 30_000 < picture.stat().st_size < 300_000
