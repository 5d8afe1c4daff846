"""A server with a key, and the studio in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

import pytest

from tests.engine.server import D_IN, LiveServer, serving
from tests.models import make_tiny_sae

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

KEY: Final = "sesame"
#: What would run if a label were taken for markup, in each of the ways that a page may be fooled.
HOSTILE: Final = (
    "<img src=x onerror=\"window.hacked='img'\"><script>window.hacked='script'</script>"
    "\"'><svg onload=\"window.hacked='svg'\">"
)
HOSTILE_FEATURE: Final = 7
#: Milliseconds that anything on the page may take, answers included.
PATIENCE: Final = 150_000
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; its tests are skipped if there is none."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="package")
def server(
    chromium: str, demo_model: Path, demo_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """SmolLM2 with the demo SAE and one of hostile labels, behind a key, with a preset."""
    folder = tmp_path_factory.mktemp("studio")
    labels = [{"index": HOSTILE_FEATURE, "label": HOSTILE, "examples": [{"text": HOSTILE}]}]
    hostile = make_tiny_sae(folder / "hostile", d_in=D_IN, d_sae=64, layer=20, features=labels)
    presets = folder / "presets"
    presets.mkdir()
    preset = {
        "steering": {"interventions": [{"sae": "l14", "feature": 2417, "op": "ablate"}]},
        "description": HOSTILE,
    }
    (presets / "quiet.json").write_text(json.dumps(preset))
    saes = {"l14": demo_sae, "hostile": hostile}
    flags = ("--no-steering-self-check", "--api-key", KEY, "--steering-presets", str(presets))
    with serving(demo_model, saes, folder / "server.log", *flags) as started:
        started.client.headers["Authorization"] = f"Bearer {KEY}"
        yield started


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    # Not for a whole session: while it runs, no test with an event loop of its own could.
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium)
        yield launched
        launched.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser that was never here."""
    made = browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
    made.set_default_timeout(PATIENCE)
    yield made
    made.close()


class Heard:
    """What pages of a context said and asked for."""

    def __init__(self, context: BrowserContext) -> None:
        self.errors: list[str] = []
        self.requests: list[Any] = []
        self.responses: list[Any] = []
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        context.on("console", self._console)
        context.on("request", lambda request: self.requests.append(request))
        context.on("response", lambda response: self.responses.append(response))

    def _console(self, message: Any) -> None:
        # A refused request is logged as an error by the browser itself.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.errors.append(message.text)


@pytest.fixture
def heard(context: BrowserContext, server: LiveServer) -> Iterator[Heard]:
    """At the end of a test no page of its context may have said an error or asked another host."""
    found = Heard(context)
    yield found
    assert found.errors == []
    hosts = {urlsplit(request.url).netloc for request in found.requests}
    assert hosts <= {urlsplit(server.base_url).netloc}


OpenStudio = Callable[..., "Page"]


@pytest.fixture
def open_studio(context: BrowserContext, heard: Heard, server: LiveServer) -> OpenStudio:
    """Open the page, with the key and this set-up, once it knows what is served."""

    def run(setup: dict[str, Any] | None = None, key: str | None = KEY) -> Page:
        page = context.new_page()
        if key is not None:
            page.add_init_script(
                f"sessionStorage.setItem('vllm-sae-studio-key', {json.dumps(key)})"
            )
        page.goto(address(server, setup))
        if key is not None:
            page.locator("#results li").first.wait_for()
        return page

    return run


def address(server: LiveServer, setup: dict[str, Any] | None = None) -> str:
    """Of the page, with a set-up in its fragment as its own links have it."""
    fragment = "" if setup is None else f"#setup={quote(json.dumps(setup))}"
    return f"{server.base_url}/studio{fragment}"
