"""Columns asked side by side: what the studio shows is what the server says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.engine.server import MODEL, LiveServer
from tests.studio.conftest import HOSTILE_FEATURE, Heard, OpenStudio
from tests.studio.page import (
    EDIT,
    HOOK,
    MUSIC,
    MUSIC_MAX,
    PROMPT,
    SAMPLING,
    answer,
    ask,
    same_request,
    setup,
    tokens,
)

if TYPE_CHECKING:
    pass

# The first test waits for the server, too.
pytestmark = pytest.mark.timeout(700)


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
