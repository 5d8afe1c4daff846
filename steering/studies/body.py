"""The bodies of studies: strict, and refused with the codes and paths of the `steering` field."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, TypeVar, get_args

from pydantic import Field, StrictBool, StrictStr, ValidationError

from steering.errors import ErrorCode, SteeringError
from steering.request.shape import Shape
from steering.request.shape_errors import refusal
from steering.request.unvalidated import UnvalidatedSteering

#: Members of a body that are lists of texts.
TEXT_LISTS: Final = ("texts", "positive", "negative", "neutral")
_LENGTH_CODES: Final[Mapping[tuple[int | str, ...], ErrorCode]] = {
    (name,): "study_too_large" for name in TEXT_LISTS
}

B = TypeVar("B", bound="StudyBody")


#: A `steering` object inside a body, which `Context.accept` validates.
SteeringValue = Annotated[Any, UnvalidatedSteering()]


class StudyBody(Shape):
    """The members that the body of every study may have."""

    model: StrictStr | None = Field(
        default=None, description="The base model's name; a study runs no other."
    )
    stream: StrictBool | None = Field(
        default=None, description="Answer with server-sent events that tell the progress."
    )


def parse_body(model: type[B], raw: object) -> B:
    """The JSON value of a study's body as an object of its type.

    Args:
        model: the type. Its lists and numbers must be pydantic's strict ones, as in `shape.py`.
        raw: the value, as it was parsed from JSON.

    Raises:
        SteeringError: if it is not of that type, with the code and the path of what is wrong.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = refusal(error, raw, "", _members(model), _LENGTH_CODES)
        path = (found.param or "").lstrip(".")
        raise SteeringError(found.code, found.message, path or None) from None


@functools.cache
def _members(model: type[Shape]) -> dict[str, tuple[str, ...]]:
    """The members that an object may have, by the last name in its path; "" is the body's own."""
    found = {"": tuple(model.model_fields)}
    waiting = [model]
    while waiting:
        for name, field in waiting.pop().model_fields.items():
            for inner in _shapes(field.annotation):
                if name not in found:
                    waiting.append(inner)
                known = (*found.get(name, ()), *inner.model_fields)
                found[name] = tuple(dict.fromkeys(known))
    return found


def _shapes(annotation: Any) -> Iterator[type[Shape]]:
    if isinstance(annotation, type):
        if issubclass(annotation, Shape):
            yield annotation
        return
    for inner in get_args(annotation):
        yield from _shapes(inner)
