"""The studio: a web page of the server's own, at /studio."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

PAGE: Final = Path(__file__).parents[1] / "studio"
_MEDIA_TYPES: Final = {
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: By the name in the URL. A request names one of these and no path.
_FILES: Final = {
    file.name: (file.read_bytes(), _MEDIA_TYPES[file.suffix])
    for file in sorted(PAGE.iterdir())
    if file.suffix in _MEDIA_TYPES
}
_STYLE: Final = (PAGE / "studio.css").read_text(encoding="utf-8")
_LINK: Final = '<link rel="stylesheet" href="./studio/studio.css">'
# The page carries its style. A stylesheet that comes later has the browser lay out the bare page
# first, in fonts that are then thrown away: half of the time to the first paint.
_BARE: Final = (PAGE / "index.html").read_text(encoding="utf-8")
_HTML: Final = _BARE.replace(_LINK, f"<style>{_STYLE}</style>").encode()
_STYLE_HASH: Final = b64encode(sha256(_STYLE.encode()).digest()).decode()
#: Scripts are files of this server, the one style is known by its hash, and nothing else is loaded,
#: sent to or framed by anybody. Without a policy for trusted types, no script can turn a text into
#: markup.
_HEADERS: Final = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            f"style-src 'sha256-{_STYLE_HASH}'",
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
async def studio() -> Response:
    """The page. It holds nothing that a key guards: it asks the /v1 routes for what it shows."""
    return Response(_HTML, media_type="text/html; charset=utf-8", headers=_HEADERS)


@router.api_route("/studio/{name}", methods=["GET", "HEAD"])
async def studio_file(name: str) -> Response:
    """A script or picture of the page."""
    if (file := _FILES.get(name)) is None:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    content, media_type = file
    return Response(content, media_type=media_type, headers=_HEADERS)
