"""YAML beside weights: the description of a set of transcoders."""

from __future__ import annotations

from pathlib import Path

from sae.errors import SAEError
from sae.formats.layout import MAX_CONFIG_BYTES, Config


def read_yaml(path: Path) -> Config:
    """A mapping from disk. Raises SAEError if it is none, is damaged, or has aliases.

    Aliases are refused because a few aliases of aliases stand for more text than any memory holds.
    """
    import yaml

    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise SAEError(f"{path}: configuration of more than {MAX_CONFIG_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise SAEError(f"{path}: YAML with aliases is not read")
        values = yaml.safe_load(text)
    except OSError as error:
        raise SAEError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, SAEError):
            raise
        raise SAEError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SAEError(f"{path}: expected a mapping, got {type(values).__name__}")
    return Config(path, values)
