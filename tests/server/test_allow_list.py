"""VLLM_PLUGINS, vLLM's one list for plugins of every kind."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import vllm.plugins

from server.allow_list import (
    ENDPOINT_GROUP,
    GENERAL_GROUP,
    ONLY_ENDPOINTS_VARIABLE,
    NotInstalledError,
    allow_ours,
    restrict_endpoints,
)

OURS = (
    EntryPoint("vllm_sae", "steering.vllm.plugin:register", GENERAL_GROUP),
    EntryPoint("vllm_sae", "server.plugin:SteeringEndpointPlugin", ENDPOINT_GROUP),
)
OTHERS = (
    EntryPoint("theirs", "x:y", GENERAL_GROUP),
    EntryPoint("npu", "x:y", "vllm.platform_plugins"),
    EntryPoint("routes", "x:y", ENDPOINT_GROUP),
    EntryPoint("unrelated", "x:y", "console_scripts"),
)


def test_everything_but_others_routes_stays_on() -> None:
    environ: dict[str, str] = {}
    allow_ours(environ, [*OURS, *OTHERS])
    assert environ == {"VLLM_PLUGINS": "npu,theirs,vllm_sae"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("theirs", "theirs,vllm_sae"),
        ("routes,vllm_sae", "routes,vllm_sae"),
        ("", ",vllm_sae"),
    ],
)
def test_users_own_list_is_kept(before: str, after: str) -> None:
    environ = {"VLLM_PLUGINS": before}
    allow_ours(environ, [*OURS, *OTHERS])
    assert environ == {"VLLM_PLUGINS": after}


def test_namesake_of_a_general_plugin_adds_no_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    allow_ours(environ, [*OURS, *OTHERS, EntryPoint("theirs", "x:y", ENDPOINT_GROUP)])
    assert environ[ONLY_ENDPOINTS_VARIABLE] == "vllm_sae"

    monkeypatch.setenv(ONLY_ENDPOINTS_VARIABLE, "vllm_sae")
    everything = {"theirs": object, "vllm_sae": object}
    monkeypatch.setattr(vllm.plugins, "load_plugins_by_group", lambda group: everything)
    restrict_endpoints()
    assert vllm.plugins.load_plugins_by_group(GENERAL_GROUP) == everything
    assert [*vllm.plugins.load_plugins_by_group(ENDPOINT_GROUP)] == ["vllm_sae"]


def test_nothing_is_restricted_unless_the_list_was_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ONLY_ENDPOINTS_VARIABLE, raising=False)
    load = vllm.plugins.load_plugins_by_group
    restrict_endpoints()
    assert vllm.plugins.load_plugins_by_group is load


def test_package_that_is_not_installed_is_refused() -> None:
    with pytest.raises(NotInstalledError):
        allow_ours({}, [OURS[0], *OTHERS])
