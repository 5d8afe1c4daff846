"""What a refusal of a study says."""

from __future__ import annotations

from typing import Any


def refused(response: Any, status: int = 400) -> tuple[str, str | None]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["code"], error["param"]
