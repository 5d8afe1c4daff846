"""Parameters in paths and queries: taken as text, so that a wrong one is refused in our shape."""

from __future__ import annotations

import re
from typing import Final

from starlette.convertors import PathConvertor, register_url_convertor

from sae.sae import SAE
from server.state import SteeringState
from steering.errors import NotFoundError, SteeringError

#: The name of a convertor: a parameter that is the rest of the path, so that a name with a slash in
#: it, which nothing has, is refused in our shape too.
ANY_NAME: Final = "any_name"
#: More digits than any index has; Python refuses to convert very long ones.
MAX_DIGITS: Final = 18


class _AnyName(PathConvertor):
    """Slashes too, but not the last one: a path that ends so is redirected as everywhere else."""

    regex = ".*[^/]"


register_url_convertor(ANY_NAME, _AnyName())


def known_sae(state: SteeringState, name: str) -> SAE:
    """The SAE of this name, from the URL's path. Raises NotFoundError if there is none."""
    try:
        return state.catalog.sae(name)
    except SteeringError as error:
        raise NotFoundError(error.code, error.message, "sae") from None


def feature_index(text: str, d_sae: int) -> int:
    """The index that stands in a path.

    Raises:
        SteeringError: if it is no integer.
        NotFoundError: if it is not in `[0, d_sae)`.
    """
    if not re.fullmatch(r"-?[0-9]+", text):
        raise SteeringError("invalid_type", f"expected an integer, got {text[:40]!r}", "feature")
    if len(text) > MAX_DIGITS or not 0 <= int(text) < d_sae:
        raise NotFoundError(
            "feature_out_of_range", f"feature {text[:40]} not in [0, {d_sae})", "feature"
        )
    return int(text)


def whole_number(name: str, text: str | None, default: int, lowest: int, highest: int) -> int:
    """The value of a query's parameter; the default if it is left out.

    Raises:
        SteeringError: if it is no integer, or not in `[lowest, highest]`.
    """
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]+", text):
        raise SteeringError("invalid_type", f"expected an integer, got {text[:40]!r}", name)
    if len(text) > MAX_DIGITS or not lowest <= int(text) <= highest:
        raise SteeringError(
            "invalid_value", f"{name} {text[:40]} not in [{lowest}, {highest}]", name
        )
    return int(text)
