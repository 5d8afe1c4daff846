"""What a preset is: a name, a `steering` object, a description."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sae.errors import SAEError
from steering.errors import SteeringError
from steering.request.shape_errors import wrong_type

#: What checks a `steering` object against the loaded SAEs; raises SteeringError.
Validate = Callable[[object], object]

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FIELDS: Final = ("steering", "description")
#: Characters of a description.
MAX_DESCRIPTION: Final = 4096
#: Bytes of a file: 64 edits with eight conditions each take a tenth of it.
MAX_FILE_BYTES: Final = 2**20


@dataclass(frozen=True)
class Preset:
    """One preset.

    Attributes:
        name: what a request gives as `model`.
        steering: the `steering` object, as it was written.
        description: for people; None if there is none.
        created: seconds since the epoch, of the file that it is kept in.
        fixed: whether it comes from `--steering-preset`, and so cannot be changed over HTTP.
    """

    name: str
    steering: dict[str, Any]
    description: str | None
    created: int
    fixed: bool

    def to_json(self, base: str) -> dict[str, Any]:
        """The entry as the routes show it; `base` is the served model's name."""
        return {
            "name": self.name,
            "object": "steering.preset",
            "description": self.description,
            "steering": self.steering,
            "base": base,
            "created": self.created,
        }

    def to_file(self) -> str:
        """What a preset's file holds."""
        body: dict[str, Any] = {"steering": self.steering}
        if self.description is not None:
            body["description"] = self.description
        return json.dumps(body, indent=2, ensure_ascii=False) + "\n"


def check_name(name: str) -> None:
    """Raises SteeringError `invalid_value` if no preset may be called so."""
    # A client takes the steps . and .. out of a path before it sends it.
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise SteeringError(
            "invalid_value",
            "a preset's name is 1 to 64 characters of A-Za-z0-9._- and not . or .., "
            f"got {name[:80]!r}",
            "name",
        )


def read_body(body: object, validate: Validate) -> tuple[dict[str, Any], str | None]:
    """The steering and the description in what a FILE or a PUT holds.

    That is a `steering` object, or `{"steering": {...}, "description": "..."}`.

    Raises:
        SteeringError: as a request with this steering would be refused.
    """
    if not isinstance(body, dict):
        raise wrong_type(body, "an object", "steering")
    steering: object = body
    description: object = None
    if "steering" in body or "description" in body:
        for key in body:
            if key not in _FIELDS:
                raise SteeringError(
                    "unknown_field",
                    f"unknown field {str(key)[:40]!r}; known here: {', '.join(_FIELDS)}",
                    str(key)[:100],
                )
        steering, description = body.get("steering"), body.get("description")
    if description is not None and not isinstance(description, str):
        raise wrong_type(description, "a string", "description")
    if isinstance(description, str) and len(description) > MAX_DESCRIPTION:
        raise SteeringError(
            "invalid_value",
            f"a description of {len(description)} characters, the limit is {MAX_DESCRIPTION}",
            "description",
        )
    validate(steering)
    assert isinstance(steering, dict)  # all that validation lets through
    return steering, description


def load_file(name: str, path: Path, validate: Validate, *, fixed: bool) -> Preset:
    """Read and check a preset's file.

    Raises:
        SAEError: naming the file, if it cannot be read or would be refused as a request.
    """
    try:
        created = int(path.stat().st_mtime)
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SAEError(f"preset {name!r}: {path}: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise SAEError(f"preset {name!r}: {path}: more than {MAX_FILE_BYTES} bytes")
    try:
        check_name(name)
        steering, description = read_body(json.loads(raw), validate)
    except SteeringError as error:
        where = f" ({error.param})" if error.param else ""
        raise SAEError(f"preset {name!r}: {path}: {error.message}{where}") from error
    except (ValueError, RecursionError) as error:
        raise SAEError(f"preset {name!r}: {path}: not JSON: {error}") from error
    return Preset(name, steering, description, created, fixed)
