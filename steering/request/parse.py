"""From the JSON of a ``steering`` field to a spec: the rules that need the loaded SAEs."""

from __future__ import annotations

from collections.abc import Sequence

from steering.errors import SteeringError
from steering.request.condition_rules import (
    parse_stop_when,
    parse_when,
    refuse_too_late,
    refuse_too_many,
)
from steering.request.conditions import When
from steering.request.edits import Edit
from steering.request.facts import SAEs, named_feature, named_sae, raw_value
from steering.request.limits import DEFAULT_TOP_K, MAX_INTERVENTIONS
from steering.request.positions import Positions
from steering.request.reread import parse_protect, refuse_reread
from steering.request.shape import (
    InterventionShape,
    PositionsShape,
    ReadShape,
    parse_shape,
)
from steering.request.spec import Read, SteeringSpec, nothing_loaded, refuse_duplicates

EVERYWHERE = Positions()


def parse_spec(raw: object, saes: SAEs, *, empty_allowed: bool = False) -> SteeringSpec:
    """Validate the JSON value of a ``steering`` field.

    Args:
        raw: the value as parsed from JSON; numbers and booleans keep their JSON types.
        saes: the loaded SAEs by name.
        empty_allowed: accept a field that does nothing, as of a request that opts out of a default.

    Raises:
        SteeringError: if it is not valid, with the code and the path of what is wrong.
    """
    if not saes:
        raise nothing_loaded()
    shape = parse_shape(raw)
    positions = _positions(shape.positions, EVERYWHERE)
    when = None if shape.when is None else parse_when(shape.when, "steering.when", saes)
    error_term = shape.error_term is not False
    read = _read(shape.read, saes)
    edits = _edits(shape.interventions or (), positions, when, saes)
    stop_when = parse_stop_when(shape.stop_when, saes)
    if not (edits or read or stop_when or empty_allowed):
        raise SteeringError(
            "invalid_value",
            f"steering needs 1 to {MAX_INTERVENTIONS} interventions, a read or a stop_when",
            "steering.interventions",
        )
    if read is not None and positions.empty:
        raise SteeringError(
            "invalid_value",
            f"the read covers no token: {positions.why_empty()}",
            "steering.positions",
        )
    refuse_too_many((when, *(edit.when for edit in edits)), stop_when)
    refuse_duplicates(edits, Positions.overlaps)
    if not error_term:
        _refuse_reconstruction(edits, saes)
    reread = shape.match == "reread"
    if reread:
        refuse_reread(edits, error_term, saes)
    return SteeringSpec(
        edits,
        positions,
        error_term,
        bool(shape.report),
        read,
        stop_when,
        reread,
        parse_protect(shape.protect or (), edits, error_term, saes),
        shape.max_share,
    )


def _edits(
    raw: Sequence[InterventionShape], positions: Positions, when: When | None, saes: SAEs
) -> tuple[Edit, ...]:
    return tuple(
        _edit(item, f"steering.interventions[{i}]", positions, when, saes)
        for i, item in enumerate(raw)
    )


def _edit(
    raw: InterventionShape, path: str, positions: Positions, when: When | None, saes: SAEs
) -> Edit:
    name = named_sae(raw.sae, f"{path}.sae", saes)
    feature = named_feature(raw.feature, path, saes[name])
    value = _value(raw, path)
    if raw.unit == "max_act" and raw.op == "scale":
        raise SteeringError(
            "invalid_value",
            "unit max_act has no meaning for scale, whose value is a factor",
            f"{path}.unit",
        )
    covered = _positions(raw.positions, positions)
    if covered.empty:
        raise SteeringError(
            "invalid_value",
            f"this edit can never apply: {covered.why_empty()}",
            f"{path}.positions" if raw.positions is not None else "steering.positions",
        )
    if raw.when is not None:
        when = parse_when(raw.when, f"{path}.when", saes)
    if when is not None:
        refuse_too_late(when, name, covered.prompt, saes)
    effective = raw_value(value, raw.unit, name, feature, path, saes)
    return Edit(name, feature, raw.op, value, raw.unit or "raw", effective, covered, when)


def _value(raw: InterventionShape, path: str) -> float:
    if raw.op == "ablate":
        if raw.value is not None:
            raise SteeringError("invalid_value", "ablate takes no value", f"{path}.value")
        return 0.0
    if raw.value is None:
        raise SteeringError("invalid_value", f"{raw.op} needs a value", f"{path}.value")
    return raw.value


def _positions(raw: PositionsShape | None, default: Positions) -> Positions:
    if raw is None:
        return default
    return Positions(
        prompt=default.prompt if raw.prompt is None else raw.prompt,
        generation=default.generation if raw.generation is None else raw.generation,
        special_tokens=(
            default.special_tokens if raw.special_tokens is None else raw.special_tokens
        ),
        start=default.start if raw.start is None else raw.start,
        end=default.end if raw.end is None else raw.end,
    )


def _read(raw: ReadShape | None, saes: SAEs) -> Read | None:
    if raw is None:
        return None
    return Read(
        sae=named_sae(raw.sae, "steering.read.sae", saes),
        top_k=DEFAULT_TOP_K if raw.top_k is None else raw.top_k,
        stream=bool(raw.stream),
    )


def _refuse_reconstruction(edits: Sequence[Edit], saes: SAEs) -> None:
    """Refuse ``error_term: false`` if it is not defined for these edits."""
    by_hook: dict[str, str] = {}
    for edit in edits:
        if not saes[edit.sae].error_term:
            raise SteeringError(
                "unsupported_op",
                f"error_term false is for SAEs and transcoders, which SAE {edit.sae!r} is not",
                "steering.error_term",
            )
        hook = saes[edit.sae].hook
        other = by_hook.setdefault(hook, edit.sae)
        if other != edit.sae:
            raise SteeringError(
                "unsupported_combination",
                f"error_term false replaces the stream, but SAEs {other!r} and {edit.sae!r} "
                f"both edit {hook}",
                "steering.error_term",
            )
