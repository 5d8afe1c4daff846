"""The refusal of a model, which is raised at start and shown as one line."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """The model's structure is not one that this project knows how to hook."""
