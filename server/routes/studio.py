"""The studio: a web page of the server's own, at /studio."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

PAGE: Final = Path(__file__).parents[1] / "studio"
_MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: By the name in the URL. A request names one of these and no path.
_FILES: Final = {file.name: file for file in sorted(PAGE.iterdir()) if file.suffix in _MEDIA_TYPES}
#: Scripts and styles are files of this server, and nothing else is loaded, sent to or framed by
#: anybody. Without a policy for trusted types, no script can turn a text into markup.
_HEADERS: Final = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # The files are small, and those of another version must not be mixed with these.
    "Cache-Control": "no-store",
}

router = APIRouter(include_in_schema=False)


@router.api_route("/studio", methods=["GET", "HEAD"])
async def studio() -> FileResponse:
    """The page. It holds nothing that a key guards: what it shows, it asks of /v1 routes."""
    return _answer("index.html")


@router.api_route("/studio/{name}", methods=["GET", "HEAD"])
async def studio_file(name: str) -> FileResponse:
    """A script, style or picture of the page."""
    return _answer(name)


def _answer(name: str) -> FileResponse:
    if (file := _FILES.get(name)) is None:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    return FileResponse(file, media_type=_MEDIA_TYPES[file.suffix], headers=_HEADERS)
