"""From pydantic's errors to the codes and paths that clients are told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from steering.errors import ErrorCode, SteeringError

#: How many characters of a client's own name a path shows; a message shows fewer.
_LONGEST_NAME: Final = 100

#: What was expected instead, by pydantic's type of the error.
_EXPECTED: Final = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a string",
}
#: How a number is limited, by pydantic's type of the error, and the limit's key in the context.
_LIMITS: Final = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
#: Codes of lists that have a code of their own for being too long.
_LENGTH_CODES: Final[Mapping[tuple[int | str, ...], ErrorCode]] = {
    ("interventions",): "too_many_interventions"
}


def refusal(
    error: ValidationError,
    value: object,
    root: str,
    members: Mapping[str, Sequence[str]],
    length_codes: Mapping[tuple[int | str, ...], ErrorCode] = _LENGTH_CODES,
) -> SteeringError:
    """The refusal of the first fault that a failed validation found.

    If that fault is a missing member and the same object has an unknown one, the unknown one is
    refused: it is probably the missing one, misspelt.

    Args:
        error: a strict model's; the types of its errors are all known to this module.
        value: what was validated.
        root: the path of ``value``.
        members: the names that an object may have, by the last name in its path, "" for the root's.
        length_codes: the codes of lists that are too long, by their place; ``invalid_value`` for
            others.
    """
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "missing":
        siblings = (e for e in found if e["loc"][:-1] == first["loc"][:-1])
        first = next((e for e in siblings if e["type"] == "extra_forbidden"), first)
    if first["type"] == "string_unicode" and isinstance(_at(value, first["loc"]), dict):
        # A key, not a value, has a lone surrogate, which UTF-8 cannot hold.
        known = members[_last_name(first["loc"])]
        return _unknown(first["input"], _path(root, first["loc"]), known)
    return _refusal(first, root, members, length_codes)


def shown(value: object) -> str:
    """``value`` as an error message may show it: short, whatever a client sends."""
    try:
        return _clip(json.dumps(value))
    except (TypeError, ValueError, RecursionError):  # e.g. an integer of 5000 digits
        return f"one of type {type(value).__name__}"


def wrong_type(raw: object, wanted: str, path: str) -> SteeringError:
    """The refusal of a value whose type is not ``wanted``."""
    return SteeringError("invalid_type", f"expected {wanted}, got {shown(raw)}", path)


def _refusal(
    error: ErrorDetails,
    root: str,
    members: Mapping[str, Sequence[str]],
    length_codes: Mapping[tuple[int | str, ...], ErrorCode],
) -> SteeringError:
    kind, loc, raw = error["type"], error["loc"], error["input"]
    context: Mapping[str, Any] = error.get("ctx", {})
    path, name = _path(root, loc), _last_name(loc) or root
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(loc[-1], _path(root, loc[:-1]), members[_last_name(loc[:-1])])
    if kind == "missing":
        return SteeringError("invalid_value", f"{name} is required", path)
    if kind == "literal_error" and not isinstance(raw, str):
        return wrong_type(raw, "a string", path)
    if kind == "float_type" and type(raw) is int:  # an integer that no float can hold
        return SteeringError("invalid_value", f"{name} is too large for a number", path)
    if kind in _EXPECTED:
        return wrong_type(raw, _EXPECTED[kind], path)
    if kind == "too_long":
        return SteeringError(
            length_codes.get(loc, "invalid_value"),
            f"{context['actual_length']} items in {name}, the limit is {context['max_length']}",
            path,
        )
    return SteeringError("invalid_value", f"{name} {_fault(kind, raw, context)}", path)


def _fault(kind: str, raw: object, context: Mapping[str, Any]) -> str:
    """What is wrong with a value of the right type."""
    if kind == "too_short":
        return "is an empty list: give at least one"
    if kind == "finite_number":
        return f"{raw} is not finite"
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return f"must be {words} {context[key]:.10g}, not {shown(raw)}"
    assert kind in ("literal_error", "string_unicode"), kind
    return f"{shown(raw)} is not {context.get('expected', 'known')}"


def _unknown(key: object, path: str, known: Sequence[str]) -> SteeringError:
    if key in known:  # the other members have made this an object of another shape
        said = f"field {shown(key)} does not go with the others here"
    else:
        said = f"unknown field {shown(key)}; known here: {', '.join(known)}"
    return SteeringError("unknown_field", said, f"{path}.{_clip(str(key), _LONGEST_NAME)}")


def _path(root: str, loc: tuple[int | str, ...]) -> str:
    parts = (f"[{p}]" if isinstance(p, int) else f".{_clip(p, _LONGEST_NAME)}" for p in loc)
    return root + "".join(parts)


def _last_name(loc: tuple[int | str, ...]) -> str:
    return next((part for part in reversed(loc) if isinstance(part, str)), "")


def _at(value: Any, loc: tuple[int | str, ...]) -> object:
    for part in loc:
        value = value[part]
    return value


def _clip(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
