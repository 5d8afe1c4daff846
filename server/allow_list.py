"""`VLLM_PLUGINS`, vLLM's one allow-list for plugins of every kind.

Endpoint plugins load only if the list names them, so ours must be on it. Every other kind loads
unless there is a list that leaves it out. So naming ours alone would switch off a user's others,
and naming theirs as well could switch on routes that were off.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, MutableMapping
from importlib.metadata import EntryPoint, distributions
from typing import Any, Final

PLUGIN_NAME: Final = "vllm_sae"
ENDPOINT_GROUP: Final = "vllm.endpoint_plugins"
GENERAL_GROUP: Final = "vllm.general_plugins"
VARIABLE: Final = "VLLM_PLUGINS"
#: Names the only endpoint plugins to load. It is set if the list had to name a plugin of another
#: kind that shares its name with an endpoint plugin.
ONLY_ENDPOINTS_VARIABLE: Final = "STEERING_ONLY_ENDPOINTS"


class NotInstalledError(RuntimeError):
    """vLLM would not find our plugins."""


def allow_ours(environ: MutableMapping[str, str], installed: Iterable[EntryPoint]) -> None:
    """Put our plugins on the list and leave everybody else's as they are.

    Args:
        environ: the environment of this process, which the engine's processes inherit.
        installed: every entry point there is.

    Raises:
        NotInstalledError: if our entry points are not among them.
    """
    groups: dict[str, set[str]] = {}
    for entry in installed:
        if entry.group.startswith("vllm."):
            groups.setdefault(entry.group, set()).add(entry.name)
    if not all(PLUGIN_NAME in groups.get(group, ()) for group in (ENDPOINT_GROUP, GENERAL_GROUP)):
        raise NotInstalledError(
            "vLLM cannot find the vllm-sae plugins; install the package (pip install -e .)"
        )
    endpoints = groups.pop(ENDPOINT_GROUP)
    if VARIABLE in environ:
        names = environ[VARIABLE].split(",")
        environ[VARIABLE] = ",".join(dict.fromkeys([*names, PLUGIN_NAME]))
        return
    others = set().union(*groups.values())
    environ[VARIABLE] = ",".join(sorted(others))
    if endpoints & others != {PLUGIN_NAME}:
        environ[ONLY_ENDPOINTS_VARIABLE] = PLUGIN_NAME


def restrict_endpoints() -> None:
    """A `vllm.general_plugins` entry point: let only those endpoint plugins load that were meant.

    Needed if a general plugin and an endpoint plugin have the same name.
    """
    allowed = os.environ.get(ONLY_ENDPOINTS_VARIABLE)
    if allowed is None:
        return
    import vllm.plugins

    load = vllm.plugins.load_plugins_by_group

    def load_allowed(group: str) -> dict[str, Any]:
        found: dict[str, Any] = load(group)
        if group != ENDPOINT_GROUP:
            return found
        return {name: factory for name, factory in found.items() if name in allowed.split(",")}

    vllm.plugins.load_plugins_by_group = load_allowed


def installed_entry_points() -> list[EntryPoint]:
    """Every entry point of every installed distribution."""
    return [entry for dist in distributions() for entry in dist.entry_points]
