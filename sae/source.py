"""Where an SAE comes from: the `--sae` flag, and turning what it names into a path on disk."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from sae import hub, registry
from sae.card import HookPoint
from sae.errors import SAEError
from sae.numbers import positive

FORMATS = (
    "sae_lens",
    "gemma_scope",
    "gemma_scope_2",
    "llama_scope",
    "qwen_scope",
    "goodfire",
    "sparsify",
    "dictionary_learning",
)

_OPTIONS = ("hook", "format", "sink_norm")
# A client takes the steps . and .. out of a path before it sends it.
_NAME = re.compile(r"(?!\.{1,2}\Z)[^\s/\\,=?#%]{1,128}")
# Python's own reading of numbers is wider: 1_000, spaces around, the digits of every script.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class SAEReference:
    """One `--sae` flag: a name, a source, what the source does not state, and the local path."""

    name: str
    source: str
    hook: str | None = None
    format: str | None = None
    sink_norm: float | None = None
    path: str | None = None
    # What SAELens' registry states beside the configuration: the factor s that brings inputs to an
    # average norm of sqrt(d_in), for weights into which it has not been folded; and a
    # normalisation that replaces the configuration's.
    norm_scaling_factor: float | None = None
    normalize_activations: str | None = None

    @classmethod
    def parse(cls, flag: str) -> SAEReference:
        """Read `NAME=SOURCE[,hook=..][,format=..][,sink_norm=N]`."""
        name, separator, source = flag.partition("=")
        if not separator:
            raise SAEError(f"--sae {flag!r}: expected NAME=SOURCE")
        if not _NAME.fullmatch(name):
            raise SAEError(
                f"--sae {flag!r}: the name {name!r} must be 1 to 128 characters without spaces "
                "or any of / \\ , = ? # %, and not . or .."
            )
        return _with_options(name, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the engine's configuration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SAEReference:
        return cls(**fields)


def parse_source(text: str) -> SAEReference:
    """Read `SOURCE[,hook=..][,format=..][,sink_norm=N]`; the name comes from the source."""
    ref = _with_options("", text)
    stem = PurePosixPath(ref.source.partition("@")[0].rstrip("/")).name
    name = re.sub(r"[\s/\\,=?#%:]+", "-", stem).strip("-")[:128]
    return replace(ref, name=name or "sae")


def resolve(ref: SAEReference) -> SAEReference:
    """Fill in the local path, fetching what lies elsewhere; SAEError where it cannot be had."""
    if ref.path is not None:
        return ref
    if ref.source.startswith(registry.SCHEME):
        entry = registry.look_up(ref.source)
        return replace(
            ref,
            path=str(hub.fetch(entry.source)),
            norm_scaling_factor=entry.norm_scaling_factor,
            normalize_activations=entry.normalize_activations,
        )
    if ref.source.startswith(hub.SCHEME):
        return replace(ref, path=str(hub.fetch(ref.source)))
    if "://" in ref.source:
        raise SAEError(f"{ref.source}: unknown scheme, expected a path, hf:// or sae_lens://")
    try:
        # Symbolic links stay: a hub cache's blobs have no file names.
        path = Path(os.path.abspath(Path(ref.source).expanduser()))
        found = path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise SAEError(f"{ref.source}: cannot be read: {error.strerror}") from error
    except RuntimeError as error:  # the ~ of a user who does not exist
        raise SAEError(f"{ref.source}: {error}") from error
    if not found:
        raise SAEError(f"{ref.source}: no such file or folder")
    return replace(ref, path=str(path))


def _with_options(name: str, text: str) -> SAEReference:
    source, options = _split(text)
    if not source:
        raise SAEError(f"SAE {name!r}: the source is empty")
    values: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in _OPTIONS:
            raise SAEError(f"{text!r}: unknown option {key!r}, expected {', '.join(_OPTIONS)}")
        if key in values:
            raise SAEError(f"{text!r}: option {key!r} is given twice")
        values[key] = value
    hook, format_name, sink_norm = (values.get(key) for key in _OPTIONS)
    if hook is not None:
        HookPoint.parse(hook)
    if format_name is not None and format_name not in FORMATS:
        raise SAEError(f"{text!r}: unknown format {format_name!r}, expected {', '.join(FORMATS)}")
    return SAEReference(
        name=name,
        source=source,
        hook=hook,
        format=format_name,
        sink_norm=None if sink_norm is None else _sink_norm(text, sink_norm),
    )


def _split(text: str) -> tuple[str, list[str]]:
    """The source, and the options after it.

    What looks like an option and has no known name is part of the path where that exists.
    """
    parts = re.split(r",(?=\w+=)", text)
    known = [part.partition("=")[0] in _OPTIONS for part in parts]
    end = max((i + 1 for i in range(1, len(parts)) if not known[i]), default=1)
    path = ",".join(parts[:end])
    if end > 1 and os.path.exists(os.path.expanduser(path)):
        return path, parts[end:]
    return parts[0], parts[1:]


def _sink_norm(text: str, value: str) -> float:
    number = positive(float(value)) if _NUMBER.fullmatch(value) else None
    if number is None:
        raise SAEError(f"{text!r}: sink_norm must be a positive finite number, got {value!r:.40}")
    return number
