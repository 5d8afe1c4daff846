"""`steering` in the wrong place of a body, where nothing would read it.

Client libraries, proxies and agents nest what they do not know: `extra_body` sent as it is written
in Python, arguments of the engine, free metadata. A request like that would run unsteered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from steering.errors import SteeringError
from steering.request.spec import nothing_loaded

FIELD: Final = "steering"
#: Fields of a body in which a misplaced `steering` is looked for, at any depth.
CONTAINERS: Final = (
    "extra_body",
    "extra_args",
    "vllm_xargs",
    "metadata",
    "chat_template_kwargs",
    "sampling_params",
)
#: Characters of a path that an answer shows; keys may be megabytes long.
MAX_PATH_CHARS: Final = 200

#: The way to a value, last step first: `(step, the way to what holds the value)`.
_Path = tuple[str, "_Path"] | tuple[()]


def refuse_misplaced(body: object, *, any_sae: bool) -> None:
    """Refuse a parsed body that has `steering` where no route reads it.

    Args:
        body: JSON as Python has it.
        any_sae: whether there is an SAE to steer through.

    Raises:
        SteeringError: `misplaced_steering` if there is one, or `steering_unavailable` if no SAE is
            loaded, since the right place would not help then. `param` is the path.
    """
    path = misplaced(body)
    if path is None:
        return
    if not any_sae:
        unavailable = nothing_loaded()
        raise SteeringError(unavailable.code, unavailable.message, path)
    inside = path.partition(".")[0].partition("[")[0]
    where = f"inside `{inside}`" if inside in CONTAINERS else f"spelled {inside!r}"
    raise SteeringError(
        "misplaced_steering",
        f"nothing reads `{FIELD}` {where}: send it as the field `{FIELD}` of the body itself; with "
        f"the OpenAI SDK that is extra_body={{{FIELD!r}: ...}}",
        path,
    )


def misplaced(body: object) -> str | None:
    """The path of the first misplaced `steering` in a parsed body; None if there is none.

    JSON null stands for a field that is left out. Every value is looked at once and nothing
    recurses, so the work is bounded by the size of the body.
    """
    if not isinstance(body, Mapping):
        return None
    for key, value in body.items():
        if key != FIELD and value is not None and _names_the_field(key):
            return str(key)
    for container in CONTAINERS:
        path = _path_inside((container, ()), body.get(container))
        if path is not None:
            return _text(path)
    return None


def _path_inside(path: _Path, value: object) -> _Path | None:
    """The path of the first `steering` inside a value, in the order of the text."""
    waiting = [(path, value)]
    while waiting:
        path, value = waiting.pop()
        inner: list[tuple[_Path, object]] = []
        if isinstance(value, Mapping):
            for key, item in value.items():
                if item is not None and _names_the_field(key):
                    return (f".{key}", path)
                inner.append(((f".{key}", path), item))
        elif isinstance(value, list):
            inner = [((f"[{i}]", path), item) for i, item in enumerate(value)]
        waiting.extend(reversed(inner))
    return None


def _names_the_field(key: object) -> bool:
    return isinstance(key, str) and len(key) == len(FIELD) and key.lower() == FIELD


def _text(path: _Path) -> str:
    words: list[str] = []
    while path:
        word, path = path
        words.append(word)
    text = "".join(reversed(words))
    return text if len(text) <= MAX_PATH_CHARS else f"{text[: MAX_PATH_CHARS - 3]}..."
