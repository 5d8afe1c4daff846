"""The studio in a real browser, on a real server: what it shows is what the server says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import pytest

from tests.engine.server import MODEL, LiveServer
from tests.studio.conftest import (
    HOSTILE,
    HOSTILE_FEATURE,
    KEY,
    Heard,
    OpenStudio,
)

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

# The first test waits for the server, too.
pytestmark = pytest.mark.timeout(700)

#: "music (mostly the word music)", its recorded maximum, and where its SAE is.
MUSIC: Final = 2417
MUSIC_MAX: Final = 47.3
HOOK: Final = "blocks.14.hook_resid_post"
PROMPT: Final = "What did you do yesterday?"
TOKENS: Final = 16
SAMPLING: Final = {"max_tokens": TOKENS, "temperature": 0, "top_p": 1, "repetition_penalty": 1.15}
EDIT: Final = {"sae": "l14", "feature": MUSIC, "op": "clamp", "value": 1, "unit": "max_act"}


def setup(*columns: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A set-up of the page's with these edits in columns A, B and C."""
    named = [{"name": name, "edits": edits} for name, edits in zip("ABC", columns, strict=False)]
    return {"prompt": PROMPT, "sampling": SAMPLING, "columns": named, **more}


def ask(page: Page) -> None:
    """Ask all columns and wait for all answers."""
    page.click("#run")
    page.wait_for_selector("#run:not([disabled])")


def answer(page: Page, column: str) -> str:
    return page.locator(f"[data-column='{column}'] .result > .answer").inner_text()


def tokens(page: Page, column: str) -> Any:
    return page.locator(f"[data-column='{column}'] .result > .answer .token")


def same_request(server: LiveServer, **steering: Any) -> Any:
    """What the server answers to what a column asks."""
    more = {"return_token_ids": True, **SAMPLING}
    return server.chat(PROMPT, steering or None, **more).json()


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


# a. Side by side


def test_columns_are_answered_at_once_and_stop_ends_them(
    open_studio: OpenStudio, server: LiveServer
) -> None:
    page = open_studio(setup([EDIT], [], sampling={**SAMPLING, "max_tokens": 900}))
    page.click("#run")
    # All three have some and none has all: they are answered side by side.
    page.wait_for_function(
        """() => ["Unsteered", "A", "B"].every((name) => {
          const result = document.querySelector(`[data-column="${name}"] .result`);
          const tokens = result.querySelectorAll(":scope > .answer .token");
          return result.ariaBusy === "true" && tokens.length > 3;
        })"""
    )
    page.click("#stop")
    page.wait_for_selector("#run:not([disabled])")
    for name in ("Unsteered", "A", "B"):
        assert "stopped by you" in page.locator(f"[data-column='{name}'] .status").inner_text()
        assert 3 < tokens(page, name).count() < 900
    page.wait_for_function(
        """async (url) => /num_requests_running{[^}]*} 0/.test(await (await fetch(url)).text())""",
        arg=f"{server.base_url}/metrics",
        polling=200,
    )


def test_answers_are_those_of_the_api(open_studio: OpenStudio, server: LiveServer) -> None:
    page = open_studio(setup([EDIT]))
    ask(page)
    for column, interventions in (("Unsteered", None), ("A", [EDIT])):
        steering = {"interventions": interventions} if interventions else {}
        content = same_request(server, **steering)["choices"][0]["message"]["content"]
        assert answer(page, column).strip() == content.strip()
    assert answer(page, "A") != answer(page, "Unsteered")


def test_sampling_settings_and_seed_reach_the_server(open_studio: OpenStudio, heard: Heard) -> None:
    page = open_studio(setup([], prompt="Once upon a time"))
    page.select_option("#mode", "completion")
    for name, value in (
        *(("max-tokens", "7"), ("temperature", "0.9"), ("top-p", "0.8")),
        *(("penalty", "1.3"), ("seed", "11")),
    ):
        page.fill(f"#{name}", value)
    ask(page)
    bodies = [r.post_data_json for r in heard.requests if r.url.endswith("/v1/completions")]
    assert len(bodies) == 2
    for body in bodies:
        assert (
            body["prompt"] == "Once upon a time"
            and body["stream"] is True
            and body["model"] == MODEL
        )
        sampling = {name: body[name] for name in (*SAMPLING, "seed")}
        assert sampling == {
            "max_tokens": 7,
            "temperature": 0.9,
            "top_p": 0.8,
            "repetition_penalty": 1.3,
            "seed": 11,
        }
    # The same seed gives the same answer, and an edit that does nothing changes nothing.
    assert answer(page, "Unsteered") == answer(page, "A") != ""


# b. Features


def test_feature_is_found_looked_at_and_added(
    open_studio: OpenStudio, server: LiveServer, heard: Heard
) -> None:
    page = open_studio(setup([]))
    page.fill("#query", "music")
    page.get_by_role("button", name="music (mostly the word music)", exact=True).click()
    detail = server.client.get(f"/v1/saes/l14/features/{MUSIC}").json()
    panel = page.locator("#feature-detail")
    panel.get_by_text("Makes likelier").wait_for()
    shown = panel.inner_text()
    assert str(MUSIC_MAX) in shown and "0.75 % of tokens" in shown
    for token, _ in (*detail["promoted"], *detail["suppressed"]):
        assert token.strip() in shown
    for other, _ in detail["nearest"]:
        assert str(other) in shown
    panel.get_by_role("button", name="Add to column").click()
    card = page.locator("[data-column='A'] .edit")
    assert "= 47.3" in card.inner_text()

    # A slider in multiples of the maximum, and what they are in raw activations.
    card.get_by_label("Value, slider").fill("1.5")
    assert card.get_by_label("Value", exact=True).input_value() == "1.5"
    assert "= 70.9 ·" in card.inner_text()
    card.get_by_label("Unit").select_option("raw")
    assert float(card.get_by_label("Value", exact=True).input_value()) == pytest.approx(70.95)
    card.get_by_label("Operation").select_option("add")

    card.locator("summary").click()
    card.get_by_label("prompt", exact=True).uncheck()
    card.get_by_label("From position").fill("-3")
    card.get_by_label("Condition").select_option("only if a feature …")
    card.get_by_label("Feature", exact=True).fill("349")
    card.get_by_label("Value", exact=True).nth(1).fill("0.25")

    whole = page.locator("[data-column='A'] details", has_text="All edits")
    whole.locator("summary").click()
    whole.get_by_label("Solve edits to").select_option("reread")
    whole.get_by_label("Largest share").fill("0.5")
    whole.get_by_label("Further fields").fill(
        '{"stop_when": {"sae": "l14", "feature": 5, "above": 900}}'
    )
    # Another SAE in another column.
    page.click("#add-column")
    page.locator("[data-column='B']").get_by_role("button", name="Find a feature to steer").click()
    page.select_option("#feature-sae", "hostile")
    page.fill("#query", "img")
    page.locator("#results .small").click()
    page.locator("[data-column='B'] .edit").get_by_label("Operation").select_option("ablate")

    ask(page)
    sent = [r.post_data_json["steering"] for r in heard.requests if "/chat/" in r.url]
    ablated = [{"sae": "hostile", "feature": HOSTILE_FEATURE, "op": "ablate"}]
    (steering,) = [each for each in sent if each["interventions"] not in ([], ablated)]
    assert len(sent) == 3 and ablated in [each["interventions"] for each in sent]
    assert steering["interventions"] == [
        {
            **{"sae": "l14", "feature": MUSIC, "op": "add", "value": 70.95, "unit": "raw"},
            "positions": {"prompt": False, "start": -3},
            "when": {
                **{"sae": "l14", "feature": 349, "above": 0.25, "unit": "max_act"},
                "scope": "so_far",
            },
        },
    ]
    assert (steering["match"], steering["max_share"]) == ("reread", 0.5)
    assert steering["stop_when"] == {"sae": "l14", "feature": 5, "above": 900}
    assert page.locator(".column .error:visible").all_inner_texts() == []


def test_features_are_listed_in_order_and_found_in_the_prompt(
    open_studio: OpenStudio, server: LiveServer
) -> None:
    page = open_studio(setup([]))
    page.select_option("#feature-order", "density")
    listed = server.client.get("/v1/saes/l14/features?order=density&limit=1").json()["data"][0]
    page.locator("#results li", has_text=f"feature {listed['feature']}").first.wait_for()
    page.click("#more-features")
    page.wait_for_function("document.querySelectorAll('#results li').length === 60")
    page.click("#in-prompt")
    page.locator("#found", has_text="Strongest in the prompt").wait_for()
    body = {"messages": [{"role": "user", "content": PROMPT}], "top_k": 30}
    strongest = server.client.post("/v1/saes/l14/inspect", json=body).json()["features"][0]
    assert str(strongest["feature"]) in page.locator("#results li").first.inner_text()


# c. Proof


def test_tokens_are_coloured_where_the_feature_is_active_and_the_report_says_so(
    open_studio: OpenStudio, server: LiveServer
) -> None:
    page = open_studio(setup([EDIT]))
    ask(page)
    response = same_request(
        server, interventions=[EDIT], report=True, read={"sae": "l14", "top_k": 64}
    )
    read = response["steering"]["read"]["tokens"]
    generated = [token for token in read if token["phase"] == "generation"]
    active = [token for token in generated if MUSIC in dict(token["features"])]
    assert len(active) > 2
    coloured = page.locator("[data-column='A'] .result > .answer .token.active").all_inner_texts()
    assert coloured == [token["text"].strip(" ") for token in active]

    (entry,) = response["steering"]["interventions"]
    usage = response["usage"]
    entered = usage["prompt_tokens"] + usage["completion_tokens"] - 1
    said = page.locator("[data-column='A'] .report").inner_text()
    assert f"set to 47.3 on {entry['tokens_edited']} of {entered} tokens" in said
    assert f"it was active on {entry['tokens_active']} (up to" in said
    (place,) = response["steering"]["edited"]
    assert f"{HOOK} the stream changed by {place['mean_share'] * 100:.0f} %" in said
    size = page.locator("[data-column='A'] [data-size]").inner_text()
    assert f"{place['mean_share'] * 100:.0f} % of the stream in the last run" in size

    # The strongest features of a token, on hover; one of them steered by a click.
    wanted = generated[3]
    tokens(page, "A").nth(3).hover()
    panel = page.locator("#token-panel")
    rows = panel.locator("li")
    rows.first.wait_for()
    shown = [int(text) for text in panel.locator("li .id").all_inner_texts()]
    assert shown == [feature for feature, _ in wanted["features"][:8]]
    strongest = shown[0]
    panel.get_by_role("button", name=f"Steer feature {strongest}").click()
    page.locator("[data-column='A'] .edit").nth(1).wait_for()
    assert str(strongest) in page.locator("[data-column='A'] .edit").nth(1).inner_text()

    # The prompt's tokens, coloured by another of their features.
    details = page.locator("[data-column='A'] .result > details")
    details.locator("summary").click()
    first = next(token for token in read if token["phase"] == "prompt")
    details.locator(".token").first.hover()
    page.locator("#token-panel .link").first.click()
    assert page.locator("#colour-feature").input_value() == str(first["features"][0][0])
    assert "active" in (details.locator(".token").first.get_attribute("class") or "")

    # These answers were read at one SAE: they say nothing of a feature of another.
    page.select_option("#colour-sae", "hostile")
    page.fill("#colour-feature", str(HOSTILE_FEATURE))
    page.keyboard.press("Enter")
    page.locator("#colour-name", has_text="<img").wait_for()
    assert page.locator(".token.active").count() == 0


# e. Keep


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


# f. Manners


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
