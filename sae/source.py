"""Where an SAE comes from: the `--sae` flag, and turning what it names into a path on disk."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from sae import hub, registry
from sae.errors import SAEError
from sae.hook_names import parse_hook
from sae.numbers import positive
from sae.registry import RegistryFacts
from sae.unserved import refuse_by_name

FORMATS = (
    "sae_lens",
    "gemma_scope",
    "gemma_scope_2",
    "llama_scope",
    "llamascopium",
    "qwen_scope",
    "goodfire",
    "qresearch",
    "sparsify",
    "dictionary_learning",
    "circuit_tracer",
    "attention_saes",
    "direction",
)

#: `layer=all`: every layer of a source that has several, each as `NAME.L`.
ALL_LAYERS = "all"

_OPTIONS = ("hook", "format", "sink_norm", "layer", "reads", "writes")
_HOOKS = ("hook", "reads", "writes")
_LAYER = re.compile(r"\d{1,5}", re.ASCII)
# A client takes the steps . and .. out of a path before it sends it.
_NAME = re.compile(r"(?!\.{1,2}\Z)[^\s/\\,=?#%]{1,128}")
# Python's own reading of numbers is wider: 1_000, spaces around, the digits of every script.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)

# A page of the hub as a browser shows it.
_WEB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?:/(?P<path>[^?#]*))?)?/?(?:[?#].*)?"
)
# What may be a repository. A path relative to this folder may look the same.
_REPOSITORY = re.compile(r"(?![.~])[\w.-]+/(?![.])[\w.-]+(?:/[^@]+)?(?:@[^@]+)?")


@dataclass(frozen=True)
class SAEReference:
    """What the user wrote in one `--sae` flag: a name, a source, and what the source leaves out.

    Attributes:
        hook: where it reads and writes.
        layer: which layer of a source that has several; "all" for each of them.
        reads: where a transcoder reads.
        writes: where it writes.
    """

    name: str
    source: str
    hook: str | None = None
    format: str | None = None
    sink_norm: float | None = None
    layer: int | str | None = None
    reads: str | None = None
    writes: str | None = None

    @classmethod
    def parse(cls, flag: str) -> SAEReference:
        """Read `NAME=SOURCE[,hook=..][,layer=..][,format=..][,sink_norm=N]...`.

        Raises:
            SAEError: if the name, an option or its value is not as it should be.
        """
        name, separator, source = flag.partition("=")
        if not separator:
            raise SAEError(f"--sae {flag!r}: expected NAME=SOURCE")
        if not _NAME.fullmatch(name):
            raise SAEError(
                f"--sae {flag!r}: the name {name!r} must be 1 to 128 characters without spaces "
                "or any of / \\ , = ? # %, and not . or .."
            )
        return _with_options(name, source)


@dataclass(frozen=True)
class ResolvedSAE:
    """What the engine opens: a reference with its path on disk and what SAELens' registry says."""

    name: str
    source: str
    path: str
    hook: str | None = None
    format: str | None = None
    sink_norm: float | None = None
    facts: RegistryFacts = field(default_factory=RegistryFacts)
    layer: int | None = None
    reads: str | None = None
    writes: str | None = None

    @classmethod
    def of(cls, ref: SAEReference, path: Path, facts: RegistryFacts) -> ResolvedSAE:
        """A reference to one dictionary, resolved."""
        assert not isinstance(ref.layer, str), ref
        return cls(
            name=ref.name,
            source=ref.source,
            path=str(path),
            hook=ref.hook,
            format=ref.format,
            sink_norm=ref.sink_norm,
            facts=facts,
            layer=ref.layer,
            reads=ref.reads,
            writes=ref.writes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the engine's configuration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ResolvedSAE:
        """The inverse of `to_dict`."""
        return cls(**{**fields, "facts": RegistryFacts(**fields["facts"])})


def parse_source(text: str) -> SAEReference:
    """Read `SOURCE[,hook=..][,layer=..]...`; the name comes from the source.

    Raises:
        SAEError: if an option or its value is not as it should be.
    """
    ref = _with_options("", text)
    stem = PurePosixPath(ref.source.partition("@")[0].rstrip("/")).name
    name = re.sub(r"[\s/\\,=?#%:]+", "-", stem).strip("-")[:128]
    return replace(ref, name=name or "sae")


def resolve(ref: SAEReference | ResolvedSAE) -> ResolvedSAE:
    """Find the path on disk, fetching what lies elsewhere, and what the registry says of it.

    Raises:
        SAEError: if it cannot be found or fetched, its names say that it is of a kind that is not
            served, or it stands for several (which `sae.layers.resolve_all` takes).
    """
    if isinstance(ref, ResolvedSAE):
        return ref
    if isinstance(ref.layer, str):
        raise SAEError(f"{ref.source}: layer=all stands for several; name one, as layer=3")
    if ref.source.startswith(registry.SCHEME):
        entry = registry.look_up(ref.source)
        return ResolvedSAE.of(ref, hub.fetch(entry.source, ref.layer), entry.facts)
    if ref.source.startswith(hub.SCHEME):
        address = hub.HubAddress.parse(ref.source)
        refuse_by_name(ref.source, f"{address.repo}/{address.path}".rstrip("/"))
        found = registry.find(address.repo, address.path, address.parent)
        return ResolvedSAE.of(ref, hub.fetch(ref.source, ref.layer), _facts(found))
    _refuse_web_page(ref.source, ref.source)
    if "://" in ref.source:
        raise SAEError(f"{ref.source}: unknown scheme, expected a path, hf:// or sae_lens://")
    path = _local(ref.source)
    return ResolvedSAE.of(ref, path, _facts(registry.find_on_disk(path)))


def _facts(entry: registry.RegistryEntry | None) -> RegistryFacts:
    return RegistryFacts() if entry is None else entry.facts


def _refuse_web_page(source: str, url: str) -> None:
    if match := _WEB_PAGE.fullmatch(url):
        path = f"/{match['path'].strip('/')}" if match["path"] else ""
        revision = match["revision"]
        at = f"@{revision}" if revision not in (None, "main") else ""
        raise SAEError(f"{source}: write hf://{match['repo']}{path}{at} for this page of the hub")


def _local(source: str) -> Path:
    try:
        # Symbolic links stay: a hub cache's blobs have no file names.
        path = Path(os.path.abspath(Path(source).expanduser()))
        found = path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise SAEError(f"{source}: cannot be read: {error.strerror}") from error
    except RuntimeError as error:  # the ~ of a user who does not exist
        raise SAEError(f"{source}: {error}") from error
    if found:
        return path
    _refuse_web_page(source, f"https://{source}")
    if match := _REPOSITORY.fullmatch(source):
        raise SAEError(
            f"{source}: no such file or folder; if it is a repository of the hub, write "
            f"hf://{match[0].rstrip('/')}"
        )
    raise SAEError(f"{source}: no such file or folder")


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
    format_name, sink_norm = values.get("format"), values.get("sink_norm")
    if format_name is not None and format_name not in FORMATS:
        raise SAEError(f"{text!r}: unknown format {format_name!r}, expected {', '.join(FORMATS)}")
    hooks = {key: _hook(text, key, values[key]) for key in _HOOKS if key in values}
    if "hook" in hooks and len(hooks) > 1:
        raise SAEError(
            f"{text!r}: hook= states where an SAE reads and writes, reads= and writes= the two "
            "places of a transcoder; state one or the other"
        )
    return SAEReference(
        name=name,
        source=source,
        format=format_name,
        sink_norm=None if sink_norm is None else _sink_norm(text, sink_norm),
        layer=None if "layer" not in values else _layer(text, values["layer"]),
        **hooks,
    )


def _hook(text: str, key: str, name: str) -> str:
    try:
        return str(parse_hook(name))
    except SAEError as error:
        raise SAEError(f"{text!r}: {key}={name}: {error}") from error


def _layer(text: str, value: str) -> int | str:
    if value == ALL_LAYERS:
        return value
    if not _LAYER.fullmatch(value):
        raise SAEError(f"{text!r}: layer must be a number from 0, or all, got {value!r:.40}")
    return int(value)


def _split(text: str) -> tuple[str, list[str]]:
    """The source, and the options after it.

    What looks like an option but has no known name is part of the path if such a path exists.
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
