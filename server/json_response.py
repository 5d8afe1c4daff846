"""JSON responses that hold text from outside."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class TolerantJSONResponse(JSONResponse):
    """JSON in UTF-8, whatever its strings hold: lone surrogates stay the escapes they were."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")
