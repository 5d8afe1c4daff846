"""Files that hold one JSON object a line: labels, statistics, exports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from sae.errors import SAEError
from sae.numbers import finite

MAX_LINE_BYTES = 16 * 2**20


class Readable(Protocol):
    """A file of bytes, compressed or not."""

    def readline(self, size: int, /) -> bytes:
        """The next line, or its first `size` bytes."""
        ...


def place(path: Path, number: int) -> str:
    """How a message names a line of a file, counted from 1."""
    return f"{path} line {number}"


def lines(file: Readable, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number, offset, line) of every line that is not blank.

    Raises:
        SAEError: if a line is longer than `MAX_LINE_BYTES`.
    """
    number = offset = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES:
            raise SAEError(f"{place(path, number)}: longer than {MAX_LINE_BYTES} bytes")
        if line.strip():
            yield number, offset, line
        offset += len(line)


def parsed(where: str, line: bytes) -> dict[str, Any]:
    """A line's object. Raises SAEError if it is none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SAEError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise SAEError(f"{where}: expected an object")
    return values


def number_of(where: str, values: dict[str, Any], key: str) -> float | None:
    """An object's number, None if it is missing or null. Raises SAEError if it is not finite."""
    value = values.get(key)
    if value is None:
        return None
    if (number := finite(value)) is None:
        raise SAEError(f"{where}: {key} must be a finite number, got {value!r:.40}")
    return number
