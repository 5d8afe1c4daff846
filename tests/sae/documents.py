"""Texts of the recipe, as its tests need them."""

from __future__ import annotations

from sae.training.texts import Document, Kind

LONG = "This paragraph has more than forty characters, so it counts as a repetition."


def document(text: str, kind: Kind = "english", source: str = "a") -> Document:
    return Document(kind, source, text)
