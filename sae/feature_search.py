"""Full-text search over feature labels: an SQLite FTS5 index in memory.

A query is words; nothing in it is ever FTS syntax or SQL. Every word may be the beginning of a
label's word, and whole words rank before beginnings. Labels with all words are searched first,
then labels with any, then labels that contain the query as it stands.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable

MAX_QUERY_CHARS = 1000
MAX_WORDS = 16

_WORD = re.compile(r"\w+")
_SEARCH = "SELECT rowid FROM labels WHERE labels MATCH ? ORDER BY rank, rowid LIMIT ? OFFSET ?"
_COUNT = "SELECT count(*) FROM labels WHERE labels MATCH ?"


class LabelIndex:
    """An index of (feature, label) pairs; built on construction, safe from several threads."""

    def __init__(self, labels: Iterable[tuple[int, str]]) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.execute(
            "CREATE VIRTUAL TABLE labels USING fts5("
            "label, tokenize = 'unicode61 remove_diacritics 2', prefix = '1 2 3')"
        )
        with self._database:
            self._database.executemany("INSERT INTO labels(rowid, label) VALUES (?, ?)", labels)

    def search(self, query: str, limit: int, offset: int) -> tuple[list[int], int]:
        """Features that match, best first, and how many match in all."""
        query = query[:MAX_QUERY_CHARS].replace("\0", " ").strip()
        words = _WORD.findall(query)[:MAX_WORDS]
        terms = [f'("{word}" OR "{word}"*)' for word in words]
        with self._lock:
            for expression in dict.fromkeys((" AND ".join(terms), " OR ".join(terms))):
                if expression and (total := self._one(_COUNT, expression)):
                    rows = self._database.execute(_SEARCH, (expression, limit, offset))
                    return [row[0] for row in rows], total
            return self._containing(query, limit, offset)

    def _containing(self, query: str, limit: int, offset: int) -> tuple[list[int], int]:
        if not query:
            return [], 0
        total = self._one("SELECT count(*) FROM labels WHERE instr(lower(label), lower(?))", query)
        rows = self._database.execute(
            "SELECT rowid FROM labels WHERE instr(lower(label), lower(?)) "
            "ORDER BY rowid LIMIT ? OFFSET ?",
            (query, limit, offset),
        )
        return [row[0] for row in rows], total

    def _one(self, statement: str, value: str) -> int:
        return int(self._database.execute(statement, (value,)).fetchone()[0])
