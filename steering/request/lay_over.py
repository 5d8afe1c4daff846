"""A request's ``steering`` laid over a preset's: JSON in, JSON out, validated afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def lay_over(preset: Mapping[str, Any], request: object, only_sae: str | None = None) -> object:
    """What a request means that has a ``steering`` field of its own beside a preset.

    Its interventions replace all of the preset's of the same (sae, feature) and are added to the
    others; each other member that it has replaces the preset's; null is left out. The request's
    interventions come first, so that the path of a refusal is one into the request.

    Args:
        preset: a valid ``steering`` object; it is not changed.
        request: the request's value of ``steering``, not yet validated; None if it has none.
        only_sae: name of the only SAE that is loaded, which an intervention without ``sae`` means;
            None if several are.

    Returns:
        The field to validate. What is of a wrong type in ``request`` stands in it as it came.
    """
    if request is None:
        return dict(preset)
    if not isinstance(request, dict):
        return request
    own = {key: value for key, value in request.items() if value is not None}
    laid = {**{key: value for key, value in preset.items() if value is not None}, **own}
    edits, kept = own.get("interventions"), preset.get("interventions")
    if isinstance(edits, list) and kept:
        edited = {_target(edit, only_sae) for edit in edits if _names_a_feature(edit)}
        laid["interventions"] = [
            *edits,
            *(edit for edit in kept if _target(edit, only_sae) not in edited),
        ]
    return laid


def _names_a_feature(edit: object) -> bool:
    """Whether it is far enough from wrong to say which feature it edits."""
    return (
        isinstance(edit, dict)
        and type(edit.get("feature")) is int
        and isinstance(edit.get("sae"), str | None)
    )


def _target(edit: Mapping[str, Any], only_sae: str | None) -> tuple[str | None, int]:
    name = edit.get("sae")
    return (only_sae if name is None else name, edit["feature"])
