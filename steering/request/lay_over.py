"""A request's ``steering`` laid over a preset's: JSON in, JSON out, validated afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def lay_over(preset: Mapping[str, Any], request: object, only_sae: str | None = None) -> object:
    """The ``steering`` object that a request to a preset means.

    The request's interventions replace all of the preset's of the same (sae, feature) and are added
    to the others; each other member that the request has replaces the preset's. Null counts as left
    out. The request's interventions come first, so that the path of a refusal points into the
    request.

    Args:
        preset: a valid ``steering`` object; it is not changed.
        request: the request's value of ``steering``, not yet validated; None if it has none.
        only_sae: name of the only SAE that is loaded, which an intervention without ``sae`` means;
            None if several are.

    Returns:
        The field to validate. A value of a wrong type is passed on as it came, to be refused there.
    """
    if request is None:
        return dict(preset)
    if not isinstance(request, dict):
        return request
    stated = {key: value for key, value in request.items() if value is not None}
    laid = {**{key: value for key, value in preset.items() if value is not None}, **stated}
    edits, preset_edits = stated.get("interventions"), preset.get("interventions")
    if isinstance(edits, list) and preset_edits:
        edited = {_target(edit, only_sae) for edit in edits if _names_a_feature(edit)}
        laid["interventions"] = [
            *edits,
            *(edit for edit in preset_edits if _target(edit, only_sae) not in edited),
        ]
    return laid


def _names_a_feature(edit: object) -> bool:
    """Whether an intervention, which may be wrong otherwise, says which feature it edits."""
    return (
        isinstance(edit, dict)
        and type(edit.get("feature")) is int
        and isinstance(edit.get("sae"), str | None)
    )


def _target(edit: Mapping[str, Any], only_sae: str | None) -> tuple[str | None, int]:
    name = edit.get("sae")
    return (only_sae if name is None else name, edit["feature"])
