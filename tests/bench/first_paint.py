"""The studio's first paint on loopback, beside that of a page with a single word.

``python -m tests.bench.first_paint [out.json] [--full]``

Each load is in a browser context of its own, in which nothing is cached; the pages take turns. The
bare page is what Chromium itself costs here, once without headers and once with the studio's, whose
Cross-Origin-Opener-Policy has Chromium start a process anew. ``ready`` is when the studio's modules
have run. Nothing of an engine is started: the files are served by their route alone.
"""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import uvicorn
from fastapi import FastAPI, Response

from server.routes import studio
from tests.bench.record import Record, Rounds, arguments, spread

ROUNDS: Final = Rounds(short=10, full=30)
#: Milliseconds.
TARGET: Final = 200
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
BARE: Final = "<!doctype html><title>Bare</title><p>Word"
PAGES: Final = {"a bare page": "bare", "a bare page, same headers": "kept", "the studio": "studio"}
PAINTED: Final = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
READY: Final = "() => performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"


@contextmanager
def served() -> Iterator[str]:
    """The studio's route and the bare pages on a free port; the root of their addresses."""
    app = FastAPI()
    app.include_router(studio.router)

    @app.get("/bare")
    async def bare() -> Response:
        return Response(BARE, media_type="text/html")

    @app.get("/kept")
    async def kept() -> Response:
        headers = {**(await studio.studio()).headers}
        del headers["content-length"]
        return Response(BARE, headers=headers)

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()


def load(browser: Any, address: str) -> tuple[float, float]:
    """Milliseconds from the start of a navigation to its first paint, and until it is ready."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.goto(address)
    painted = page.wait_for_function(PAINTED).json_value()
    ready = page.evaluate(READY)
    context.close()
    return painted, ready


def main() -> None:
    """Load every page by turns and write the JSON."""
    from playwright.sync_api import sync_playwright

    parser = arguments(__doc__)
    args, rounds = ROUNDS.parse(parser)
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit("no Chromium: apt-get install chromium")
    record = Record(
        "first_paint",
        "The studio on loopback, a fresh browser context a load, in milliseconds: "
        "medians (quartiles).",
        {"rounds": rounds},
    )
    loads: dict[str, list[tuple[float, float]]] = {name: [] for name in PAGES}
    with served() as root, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        record.settings["browser"] = f"Chromium {browser.version}"
        for turn in range(rounds + 1):
            for name, path in PAGES.items():
                figures = load(browser, f"{root}/{path}")
                if turn:  # the first fills the machine's own caches
                    loads[name].append(figures)
        browser.close()
    for name, figures_of in loads.items():
        painted, ready = zip(*figures_of, strict=True)
        record.add(page=name, first_paint=spread(painted), ready=spread(ready))
    painted_studio = spread([painted for painted, _ in loads["the studio"]])
    record.target("the studio's first paint, milliseconds", painted_studio, TARGET, at_most=True)
    record.save(args.json)


if __name__ == "__main__":
    main()
