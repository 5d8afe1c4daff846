"""Rows of a long experiment, kept as they are made: begun again, it goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class KeptRows:
    """Rows by key in a JSON file.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Any:
        return self._rows[key]

    def of(self, key: str, make: Callable[..., Any], *args: Any) -> Any:
        """The row of a key, made of the arguments and written if it is not there yet."""
        if key not in self._rows:
            self.put(key, make(*args))
        return self._rows[key]

    def put(self, key: str, row: Any) -> None:
        """Add or replace a row."""
        self._rows[key] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._path.with_suffix(".part")
        whole.write_text(json.dumps(self._rows, indent=1) + "\n")
        whole.replace(self._path)
