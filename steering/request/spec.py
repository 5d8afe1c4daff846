"""The ``steering`` field of a request: validated strictly, resolved, in one canonical form.

No torch and no vLLM here: the HTTP layer, the cache salt, the worker and offline use all share
these types.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from steering.errors import SteeringError
from steering.request.limits import (
    DEFAULT_TOP_K,
    FLOAT32_MAX,
    MAX_INTERVENTIONS,
    MAX_TOP_K,
    OPS,
    POSITION_LIMIT,
    UNITS,
    VALUE_LIMIT,
)

#: Of a client's own words in an error's path; its message shows less.
_LONGEST_NAME: Final = 100

_SPEC_FIELDS: Final = ("interventions", "positions", "error_term", "report", "read")
_EDIT_FIELDS: Final = ("sae", "feature", "op", "value", "unit", "positions")
_POSITION_FIELDS: Final = ("prompt", "generation", "special_tokens", "start", "end")
_READ_FIELDS: Final = ("sae", "top_k")


class SAEFacts(Protocol):
    """What validation must know of a loaded SAE."""

    @property
    def hook(self) -> str: ...

    @property
    def d_sae(self) -> int: ...

    def max_activation(self, feature: int) -> float | None:
        """The recorded maximum activation in raw units, None if unknown."""
        ...


@dataclass(frozen=True)
class Positions:
    """Which tokens are covered: by phase, by kind, and by a window ``[start, end)``."""

    prompt: bool = True
    generation: bool = True
    special_tokens: bool = False
    start: int = 0
    end: int = POSITION_LIMIT

    @property
    def empty(self) -> bool:
        """Whether no token could ever be covered."""
        return self.start >= self.end or not (self.prompt or self.generation)

    def overlaps(self, other: Positions) -> bool:
        """Whether some token could be covered by both."""
        same_phase = (self.prompt and other.prompt) or (self.generation and other.generation)
        return same_phase and max(self.start, other.start) < min(self.end, other.end)

    def count(self, prompt_len: int, length: int) -> int:
        """How many of ``length`` positions phase and window cover, whatever kind of token is there.

        The first ``prompt_len`` of them are the prompt's.
        """
        first = self.start if self.prompt else max(self.start, prompt_len)
        past = min(self.end, length if self.generation else prompt_len)
        return max(past - first, 0)


@dataclass(frozen=True)
class Edit:
    """One intervention with every default filled in.

    ``value`` is what the request said (0.0 for ``ablate``); ``effective_value`` is in raw units.
    """

    sae: str
    feature: int
    op: str
    value: float
    unit: str
    effective_value: float
    positions: Positions

    def canonical(self) -> tuple[Any, ...]:
        """The edit's effect as a sortable tuple: equal tuples edit equally.

        ``ablate`` is a clamp to zero, and values are compared as the float32 the device computes
        with, so ``max_act`` and the equal raw value agree.
        """
        op = "clamp" if self.op == "ablate" else self.op
        where = self.positions
        return (
            self.sae,
            self.feature,
            op,
            float32(self.effective_value) + 0.0,  # -0.0 and 0.0 are one value
            where.prompt,
            where.generation,
            where.special_tokens,
            where.start,
            where.end,
        )


@dataclass(frozen=True)
class Read:
    """Return the ``top_k`` strongest features of each covered token at one SAE."""

    sae: str
    top_k: int


@dataclass(frozen=True)
class SteeringSpec:
    """A whole ``steering`` field, validated against the SAEs that are loaded."""

    edits: tuple[Edit, ...]
    positions: Positions
    error_term: bool
    report: bool
    read: Read | None

    @property
    def saes(self) -> tuple[str, ...]:
        """Names of the SAEs that this request edits, in order of first use."""
        return tuple(dict.fromkeys(edit.sae for edit in self.edits))

    @property
    def phase_dependent(self) -> bool:
        """Whether a token is treated differently as prompt than as generation."""
        return any(e.positions.prompt != e.positions.generation for e in self.edits)

    def canonical(self) -> bytes:
        """Bytes that are equal exactly when two specs have the same effective edits.

        The order of edits, spelled-out defaults, the unit, ``report`` and ``read`` do not count.
        """
        edits = sorted(edit.canonical() for edit in self.edits)
        return json.dumps([edits, self.error_term], separators=(",", ":")).encode()


def float32(value: float) -> float:
    """``value`` rounded to float32, the precision in which every edit is computed."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def nothing_loaded() -> SteeringError:
    """The answer of a server without SAEs to whoever asks it to steer."""
    return SteeringError(
        "steering_unavailable",
        "this server has no SAE loaded, so it cannot steer; start it with --sae NAME=SOURCE",
        "steering",
    )


def parse_spec(raw: object, saes: Mapping[str, SAEFacts]) -> SteeringSpec:
    """Validate the JSON value of a ``steering`` field.

    Args:
        raw: the value as parsed from JSON; numbers and booleans keep their JSON types.
        saes: the loaded SAEs by name.

    Raises:
        SteeringError: with the code and path that the contract's error table names.
    """
    if not saes:
        raise nothing_loaded()
    spec = _object(raw, "steering", _SPEC_FIELDS)
    positions = _positions(spec.get("positions"), "steering.positions", Positions())
    error_term = _boolean(spec.get("error_term"), "steering.error_term", default=True)
    report = _boolean(spec.get("report"), "steering.report", default=False)
    read = _read(spec.get("read"), saes)
    edits = _edits(spec.get("interventions"), positions, saes)
    if not edits and read is None:
        raise SteeringError(
            "invalid_value",
            "steering needs 1 to 64 interventions, or a read",
            "steering.interventions",
        )
    if read is not None and positions.empty:
        raise SteeringError(
            "invalid_value",
            f"a read over no token: {_describe(positions)}",
            "steering.positions",
        )
    _refuse_duplicates(edits)
    if not error_term:
        _refuse_shared_hook(edits, saes)
    return SteeringSpec(edits, positions, error_term, report, read)


def _edits(raw: object, default: Positions, saes: Mapping[str, SAEFacts]) -> tuple[Edit, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise _wrong_type(raw, "a list", "steering.interventions")
    if len(raw) > MAX_INTERVENTIONS:
        raise SteeringError(
            "too_many_interventions",
            f"{len(raw)} interventions, the limit is {MAX_INTERVENTIONS}",
            "steering.interventions",
        )
    return tuple(
        _edit(item, f"steering.interventions[{i}]", default, saes) for i, item in enumerate(raw)
    )


def _edit(raw: object, path: str, default: Positions, saes: Mapping[str, SAEFacts]) -> Edit:
    item = _object(raw, path, _EDIT_FIELDS)
    name = _sae(item.get("sae"), f"{path}.sae", saes)
    feature = _feature(item, path, saes[name])
    op = _choice(item, "op", OPS, path, required=True)
    unit = _choice(item, "unit", UNITS, path, default="raw")
    value = _value(item, path, op)
    if unit == "max_act" and op == "scale":
        raise SteeringError(
            "invalid_value", "unit max_act has no meaning for scale, a factor", f"{path}.unit"
        )
    own = item.get("positions")
    where = _positions(own, f"{path}.positions", default)
    if where.empty:
        raise SteeringError(
            "invalid_value",
            f"this edit can never apply: {_describe(where)}",
            f"{path}.positions" if own is not None else "steering.positions",
        )
    effective = value
    if unit == "max_act":
        maximum = saes[name].max_activation(feature)
        if maximum is None or not maximum > 0:
            raise SteeringError(
                "max_act_unknown",
                f"feature {feature} of SAE {name!r} has no recorded maximum activation above 0",
                f"{path}.unit",
            )
        effective = value * maximum
        if abs(effective) > FLOAT32_MAX:
            raise SteeringError(
                "invalid_value",
                f"{value} times the maximum of feature {feature}, {maximum}, exceeds float32",
                f"{path}.value",
            )
    return Edit(name, feature, op, value, unit, effective, where)


def _feature(item: Mapping[str, object], path: str, sae: SAEFacts) -> int:
    if "feature" not in item:
        raise SteeringError("invalid_value", "feature is required", f"{path}.feature")
    feature = _integer(item["feature"], f"{path}.feature")
    if not 0 <= feature < sae.d_sae:
        raise SteeringError(
            "feature_out_of_range",
            f"feature {_shown(feature)} not in [0, {sae.d_sae})",
            f"{path}.feature",
        )
    return feature


def _value(item: Mapping[str, object], path: str, op: str) -> float:
    raw = item.get("value")
    where = f"{path}.value"
    if op == "ablate":
        if raw is not None:
            raise SteeringError("invalid_value", "ablate takes no value", where)
        return 0.0
    if raw is None:
        raise SteeringError("invalid_value", f"{op} needs a value", where)
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise _wrong_type(raw, "a number", where)
    if isinstance(raw, float) and not math.isfinite(raw):
        raise SteeringError("invalid_value", f"value {raw} is not finite", where)
    if not -VALUE_LIMIT <= raw <= VALUE_LIMIT:
        raise SteeringError("invalid_value", f"value {_shown(raw)} not in [-1e6, 1e6]", where)
    return float(raw)


def _positions(raw: object, path: str, default: Positions) -> Positions:
    if raw is None:
        return default
    item = _object(raw, path, _POSITION_FIELDS)
    return Positions(
        prompt=_boolean(item.get("prompt"), f"{path}.prompt", default.prompt),
        generation=_boolean(item.get("generation"), f"{path}.generation", default.generation),
        special_tokens=_boolean(
            item.get("special_tokens"), f"{path}.special_tokens", default.special_tokens
        ),
        start=_position(item.get("start"), f"{path}.start", default.start),
        end=_position(item.get("end"), f"{path}.end", default.end),
    )


def _position(raw: object, path: str, default: int) -> int:
    if raw is None:
        return default
    position = _integer(raw, path)
    if position < 0:
        raise SteeringError(
            "invalid_value",
            f"position {_shown(position)} is negative; positions count from the prompt's start",
            path,
        )
    return min(position, POSITION_LIMIT)


def _read(raw: object, saes: Mapping[str, SAEFacts]) -> Read | None:
    if raw is None:
        return None
    item = _object(raw, "steering.read", _READ_FIELDS)
    name = _sae(item.get("sae"), "steering.read.sae", saes)
    top_k = DEFAULT_TOP_K
    if item.get("top_k") is not None:
        top_k = _integer(item["top_k"], "steering.read.top_k")
    if not 1 <= top_k <= MAX_TOP_K:
        raise SteeringError(
            "invalid_value", f"top_k {_shown(top_k)} not in [1, {MAX_TOP_K}]", "steering.read.top_k"
        )
    return Read(name, top_k)


def _sae(raw: object, path: str, saes: Mapping[str, SAEFacts]) -> str:
    if raw is None:
        if len(saes) > 1:
            raise SteeringError(
                "sae_required", f"{len(saes)} SAEs are loaded, name one: {', '.join(saes)}", path
            )
        return next(iter(saes))
    if not isinstance(raw, str):
        raise _wrong_type(raw, "a string", path)
    if raw not in saes:
        raise SteeringError(
            "unknown_sae", f"no SAE {_shown(raw)} is loaded, only {', '.join(saes)}", path
        )
    return raw


def _refuse_duplicates(edits: tuple[Edit, ...]) -> None:
    seen: dict[tuple[str, int], list[int]] = {}
    for later, edit in enumerate(edits):
        earlier = seen.setdefault((edit.sae, edit.feature), [])
        for i in earlier:
            if edits[i].positions.overlaps(edit.positions):
                raise SteeringError(
                    "duplicate_intervention",
                    f"interventions {i} and {later} both edit feature {edit.feature} of SAE "
                    f"{edit.sae!r} on the same tokens",
                    f"steering.interventions[{later}]",
                )
        earlier.append(later)


def _refuse_shared_hook(edits: tuple[Edit, ...], saes: Mapping[str, SAEFacts]) -> None:
    by_hook: dict[str, str] = {}
    for edit in edits:
        hook = saes[edit.sae].hook
        other = by_hook.setdefault(hook, edit.sae)
        if other != edit.sae:
            raise SteeringError(
                "unsupported_combination",
                f"error_term false replaces the stream, but SAEs {other!r} and {edit.sae!r} "
                f"both edit {hook}",
                "steering.error_term",
            )


def _object(raw: object, path: str, fields: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(raw, dict):
        raise _wrong_type(raw, "an object", path)
    for key in raw:
        if key not in fields:
            raise SteeringError(
                "unknown_field",
                f"unknown field {_shown(key)}; known here: {', '.join(fields)}",
                f"{path}.{_name(key)}",
            )
    return raw


def _choice(
    item: Mapping[str, object],
    key: str,
    allowed: tuple[str, ...],
    path: str,
    *,
    required: bool = False,
    default: str = "",
) -> str:
    where = f"{path}.{key}"
    if key not in item if required else item.get(key) is None:
        if required:
            raise SteeringError("invalid_value", f"{key} is required", where)
        return default
    raw = item[key]
    if not isinstance(raw, str):
        raise _wrong_type(raw, "a string", where)
    if raw not in allowed:
        raise SteeringError(
            "invalid_value", f"{key} {_shown(raw)} is not one of {', '.join(allowed)}", where
        )
    return raw


def _boolean(raw: object, path: str, default: bool) -> bool:
    if raw is None:
        return default
    if not isinstance(raw, bool):
        raise _wrong_type(raw, "true or false", path)
    return raw


def _integer(raw: object, path: str) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise _wrong_type(raw, "an integer", path)
    return raw


def _wrong_type(raw: object, wanted: str, path: str) -> SteeringError:
    return SteeringError("invalid_type", f"expected {wanted}, got {_shown(raw)}", path)


def _shown(value: object) -> str:
    """``value`` as an error message may show it: short, whatever a client sends."""
    try:
        return _clip(json.dumps(value))
    except (TypeError, ValueError, RecursionError):  # e.g. an integer of 5000 digits
        return f"one of type {type(value).__name__}"


def _name(key: object) -> str:
    return _clip(str(key), _LONGEST_NAME)


def _clip(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _describe(where: Positions) -> str:
    if not (where.prompt or where.generation):
        return "neither prompt nor generation is covered"
    return f"the window [{where.start}, {where.end}) is empty"
