"""The studio's studies, on the routes that they are made of."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.engine.server import LiveServer
from tests.studio.conftest import PATIENCE, Heard, OpenStudio
from tests.studio.page import EDIT, answer, ask

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

# The first test waits for the server, too.
pytestmark = pytest.mark.timeout(700)

WANTED: Final = "Your hobby? => I sing in a band.\nAnd then? => I went to a concert."
UNWANTED: Final = "Your hobby? => I read books.\nAnd then? => I went to the shop."
#: Texts that the demo SAE's feature of music tells apart, held out or not.
MUSICAL: Final = "What do you like? => music and songs.\nWhat is your hobby? => music and songs."
BOOKISH: Final = "What do you like? => books and maps.\nWhat is your hobby? => books and maps."
EVALUATE: Final = "/v1/steering/evaluate"
CALIBRATE: Final = "/v1/steering/calibrate"
CONTRAST: Final = "/v1/saes/{sae}/contrast"
SUGGEST: Final = "/v1/steering/suggest"
CHAT: Final = "/v1/chat/completions"


def studies(open_studio: OpenStudio, **column: Any) -> Page:
    """The page with one column, its studies open."""
    columns = [{"name": "A", "edits": [EDIT], **column}]
    sampling = {"max_tokens": 6, "temperature": 0}
    page = open_studio({"prompt": "Who are you?", "sampling": sampling, "columns": columns})
    page.click("#tab-studies")
    return page


def study(page: Page, route: str) -> Any:
    return page.locator(f"[data-study='{route}']")


def run(page: Page, route: str, heard: Heard, server: LiveServer) -> Any:
    """Run a study to its end, and ask the server the same."""
    panel = study(page, route)
    panel.locator("button.primary").click()
    panel.get_by_text("Done.", exact=True).wait_for()
    path = route.replace("{sae}", "l14")
    asked = next(each for each in reversed(heard.requests) if each.url.endswith(path))
    body = asked.post_data_json
    assert body.pop("stream") is True
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def figure(value: float) -> str:
    """As the page writes it."""
    return f"{float(f'{value:.3g}'):g}"


def test_evaluation_shows_its_figures_and_what_else_moved(
    open_studio: OpenStudio, heard: Heard, server: LiveServer
) -> None:
    page = studies(open_studio)
    (found,) = run(page, EVALUATE, heard, server)["configurations"]
    shown = study(page, EVALUATE).inner_text()
    assert f"{figure(found['kl']['mean'])} ({figure(found['kl']['max'])})" in shown
    moved = study(page, EVALUATE).locator(".moved li")
    features = found["features"][0]
    assert moved.count() >= len(features["moved"]) + 1
    first = features["moved"][0]
    assert f"{figure(first['before'])} → {figure(first['after'])}" in moved.nth(1).inner_text()
    # One of them is looked at, and its tokens coloured.
    moved.nth(1).get_by_role("button").click()
    assert page.locator("#colour-feature").input_value() == str(first["feature"])


def test_calibrated_dose_is_drawn_and_taken_over(
    open_studio: OpenStudio, heard: Heard, server: LiveServer
) -> None:
    page = studies(open_studio)
    panel = study(page, CALIBRATE)
    panel.get_by_label("Over").select_option("the prompt above")
    found = run(page, CALIBRATE, heard, server)
    assert f"{figure(found['multiplier'])} times as strong" in panel.inner_text()
    assert panel.locator("svg .dot").count() == len(found["curve"])
    panel.get_by_role("button", name="Use this strength in A").click()
    value = page.locator("[data-column='A']").get_by_label("Value", exact=True).input_value()
    assert float(value) == pytest.approx(found["steering"]["interventions"][0]["value"], rel=1e-3)


def test_features_are_found_from_two_lists_of_examples(
    open_studio: OpenStudio, heard: Heard, server: LiveServer
) -> None:
    page = studies(open_studio)
    panel = study(page, CONTRAST)
    panel.locator("button.primary").click()
    panel.get_by_text("Both lists need examples.").wait_for()
    panel.get_by_label("Wanted", exact=False).first.fill(WANTED)
    panel.get_by_label("Unwanted").fill(UNWANTED)
    found = run(page, CONTRAST, heard, server)
    rows = panel.locator(".result-row")
    assert rows.count() == len(found["positive"]) + len(found["negative"]) > 2
    assert str(found["positive"][0]["feature"]) in rows.first.inner_text()
    rows.first.locator("button.small").click()
    added = page.locator("[data-column='A'] .edit").last
    assert str(found["positive"][0]["feature"]) in added.inner_text()


def result_of(events: str) -> Any:
    """The last of a study's events."""
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return json.loads(lines[-2])


def test_suggested_edits_are_shown_and_opened_as_a_column_with_one_click(
    open_studio: OpenStudio, heard: Heard
) -> None:
    page = studies(open_studio)
    answers: list[str] = []

    def pass_on(route: Route) -> None:
        response = route.fetch(timeout=PATIENCE)
        answers.append(response.text())
        route.fulfill(response=response)

    # A browser does not keep what came as a stream, and another run may be rounded otherwise.
    page.route(f"**{SUGGEST}", pass_on)
    study(page, CONTRAST).get_by_label("Wanted", exact=False).first.fill(MUSICAL)
    study(page, CONTRAST).get_by_label("Unwanted").fill(BOOKISH)
    panel = study(page, SUGGEST)
    panel.get_by_label("Budget (KL)").fill("0.3")
    panel.get_by_label("Most edits").fill("1")
    panel.get_by_label("Budget over").select_option("the prompt above")
    panel.locator("button.primary").click()
    panel.get_by_text("Done.", exact=True).wait_for()
    found = result_of(*answers)
    (edit,) = found["steering"]["interventions"]
    gains = [figure(found[half]["after"] - found[half]["before"]) for half in ("held_out", "fit")]
    assert all(gain in panel.locator(".study-result > p").first.inner_text() for gain in gains)
    shown = panel.get_by_label("Suggested edits").locator("li").inner_text()
    assert f"{edit['sae']} · {edit['feature']}" in shown and edit["op"] in shown

    panel.get_by_role("button", name="Open as a column").click()
    panel.get_by_text("Opened as B.").wait_for()
    ask(page)
    assert answer(page, "B")
    asked = [each.post_data_json["steering"] for each in heard.requests if CHAT in each.url]
    assert {"unit": "raw", **edit} in [
        each for steering in asked for each in steering["interventions"]
    ]

    panel.get_by_role("button", name="Open as a column").click()
    panel.get_by_role("button", name="Open as a column").click()
    panel.get_by_text("remove one first").wait_for()
    assert page.locator(".column").count() == 4


def test_running_study_tells_how_far_it_is_and_can_be_cancelled(
    open_studio: OpenStudio, server: LiveServer
) -> None:
    page = studies(open_studio)
    study(page, CONTRAST).get_by_label("Wanted", exact=False).first.fill(WANTED)
    study(page, CONTRAST).get_by_label("Unwanted").fill(UNWANTED)
    panel = study(page, SUGGEST)
    panel.locator("button.primary").click()
    panel.locator("[role=status]", has_text=" of ").wait_for()
    assert panel.locator("progress").is_visible()
    panel.get_by_role("button", name="Cancel").click()
    panel.get_by_text("Cancelled.").wait_for()
    assert panel.locator("progress").is_hidden()
    page.wait_for_function(
        """async (url) => /num_requests_running{[^}]*} 0/.test(await (await fetch(url)).text())""",
        arg=f"{server.base_url}/metrics",
        polling=200,
    )


def test_refused_study_marks_the_field_in_its_column(open_studio: OpenStudio) -> None:
    stop = {"sae": "l14", "feature": 5, "above": 1}
    page = studies(open_studio, more={"stop_when": stop})
    panel = study(page, EVALUATE)
    panel.locator("button.primary").click()
    panel.locator(".error", has_text="stop_when").wait_for()
    marked = page.locator("[data-column='A'] [data-refused]")
    assert "stop_when" in (marked.get_attribute("data-field") or "")
    assert marked.is_visible()


def test_studies_that_the_server_does_not_have_are_not_shown(open_studio: OpenStudio) -> None:
    page = open_studio()
    paths: dict[str, Any] = {"/v1/steering/presets": {}, CALIBRATE: {}}
    page.route("**/openapi.json", lambda route: route.fulfill(json={"paths": paths}))
    page.reload()
    page.locator("#tab-studies").click()
    assert page.locator("[data-study]").count() == 1
    page.unroute("**/openapi.json")
    page.route("**/openapi.json", lambda route: route.fulfill(status=404, json={}))
    page.reload()
    page.locator("#tab-keep").click()
    page.locator("#presets li").first.wait_for()
    assert page.locator("#tab-studies").is_hidden()
