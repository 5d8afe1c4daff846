"""What tests of the page share: a set-up of it, and what its columns hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tests.engine.server import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

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
