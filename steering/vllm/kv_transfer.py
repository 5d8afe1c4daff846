"""KV connectors: which of them keep blocks of different steering apart, and a guard for the rest.

A connector brings KV blocks that this engine did not compute for this request. A connector that
looks them up by vLLM's block hashes is right by itself, since a request's salt is part of them. One
that looks them up by token ids would serve steered blocks to unsteered requests and the other way
round, so it is refused. One that takes another engine's blocks by request (disaggregated prefill)
is right if that engine steered the same way, so that engine says how it did, and this one compares.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from steering.vllm.door import plan_of
from steering.vllm.support import UnsupportedEngineError

#: Connectors that look blocks up by block hash, or never load any (the last two).
SALTED: Final = frozenset(
    {
        "OffloadingConnector",
        "SimpleCPUOffloadConnector",
        "MooncakeStoreConnector",
        "HiSparseConnector",
        "ExampleHiddenStatesConnector",
    }
)
#: A connector that looks blocks up by token ids and the request's salt, if its package is new
#: enough.
LMCACHE_MP: Final = "LMCacheMPConnector"
#: Connectors that take another engine's blocks by request, and only as many as they announce to the
#: scheduler.
BY_REQUEST: Final = frozenset(
    {"NixlConnector", "NixlPullConnector", "NixlPushConnector", "MooncakeConnector"}
)
MULTI: Final = "MultiConnector"

#: Key of the salt of a steered request's blocks in the ``kv_transfer_params`` that go with them.
STAMP: Final = "steering_salt"

_BY_TOKENS: Final = "looks KV blocks up by token ids alone and would mix steered and unsteered ones"
_REASONS: Final = {
    "LMCacheConnectorV1": _BY_TOKENS,
    "HF3FSKVConnector": _BY_TOKENS,
    "ExampleConnector": _BY_TOKENS,
    "DecodeBenchConnector": "fills prompts with made-up KV, so that their edits are lost",
}
_INSTEAD: Final = (
    "use --kv-offloading-size, or OffloadingConnector, SimpleCPUOffloadConnector, "
    "MooncakeStoreConnector or LMCacheMPConnector, which go by salted hashes; to take prompts from "
    "another engine, NixlConnector or MooncakeConnector"
)


def refuse_unsalted_connectors(kv_transfer_config: Any) -> None:
    """Check a ``KVTransferConfig``; None if the engine has no connector.

    Raises:
        UnsupportedEngineError: if a connector may mix steered with unsteered blocks. It names the
            connector, the reason, and what to use instead.
    """
    if kv_transfer_config is not None:
        _refuse_unsalted(vars(kv_transfer_config))


def connects_by_request(kv_transfer_config: Any) -> bool:
    """Whether some connector of a ``KVTransferConfig`` takes another engine's blocks by request."""
    return kv_transfer_config is not None and not BY_REQUEST.isdisjoint(
        _names(vars(kv_transfer_config))
    )


def guard_transfers(scheduler: Any) -> None:
    """Have a scheduler's connector offer only blocks that were steered as their request is.

    If a request's blocks elsewhere were steered differently, or it is not known how, its prompt is
    computed here. To the connector that looks as if the prefix cache held the whole prompt, and it
    tells the other engine so.

    Args:
        scheduler: vLLM's scheduler, with its connector made.
    """
    connector = scheduler.connector
    matched_tokens = connector.get_num_new_matched_tokens

    def get_num_new_matched_tokens(request: Any, num_computed_tokens: int) -> Any:
        if _comes_from_elsewhere(request) and not _is_steered_alike(request):
            return 0, False
        return matched_tokens(request, num_computed_tokens)

    connector.get_num_new_matched_tokens = get_num_new_matched_tokens


def stamp(kv_transfer_params: dict[str, Any] | None, request: Any) -> None:
    """Say how a finished request's blocks were steered, if another engine may take them.

    Args:
        kv_transfer_params: what the connector answers for the request, changed in place; None if
            no engine may take its blocks.
        request: the scheduler's request.
    """
    salt = _salt(request)
    if kv_transfer_params is not None and salt is not None:
        kv_transfer_params[STAMP] = salt


def _comes_from_elsewhere(request: Any) -> bool:
    params = request.kv_transfer_params
    return bool(params) and bool(params.get("do_remote_prefill") or params.get("remote_block_ids"))


def _is_steered_alike(request: Any) -> bool:
    return bool(request.kv_transfer_params.get(STAMP) == _salt(request))


def _salt(request: Any) -> str | None:
    """The salt of a request's blocks; None for a request that edits nothing."""
    plan = plan_of(request.sampling_params)
    return request.cache_salt if plan is not None and plan.edits else None


def _names(config: Mapping[str, Any]) -> set[str]:
    """The connector's name, or the names of the connectors that a `MultiConnector` is made of."""
    if config.get("kv_connector") != MULTI:
        return {config.get("kv_connector") or ""}
    return set().union(*map(_names, _children(config)))


def _children(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list((config.get("kv_connector_extra_config") or {}).get("connectors", ()))


def _refuse_unsalted(config: Mapping[str, Any]) -> None:
    name = config.get("kv_connector")
    if name is None:
        return
    if config.get("kv_connector_module_path") is not None:
        reason = (
            f"comes from {config['kv_connector_module_path']}, and whether it keeps steered KV "
            "blocks apart is not known"
        )
    elif name == MULTI:
        for child in _children(config):
            _refuse_unsalted(child)
        return
    elif name == LMCACHE_MP:
        if _lmcache_salts():
            return
        reason = (
            "needs an lmcache package that knows cache_salt: update lmcache, and its server too"
        )
    elif name in SALTED or name in BY_REQUEST:
        return
    else:
        reason = _REASONS.get(name, "may mix steered KV blocks with unsteered ones")
    raise UnsupportedEngineError(
        f"SAE steering does not work with the KV connector {name}, which {reason}"
        + ("" if name == LMCACHE_MP else f"; {_INSTEAD}")
    )


def _lmcache_salts() -> bool:
    """Whether the installed ``lmcache`` has the salt in its keys; older versions ignore it."""
    found = importlib.util.find_spec("lmcache")
    if found is None or found.origin is None:
        return True  # vLLM itself says that it is missing
    root = Path(found.origin).parent
    keys = root / "v1" / "multiprocess" / "custom_types.py"
    # If the package has a connector, vLLM prefers it to the one in vLLM.
    integration = root / "integration" / "vllm"
    texts = [keys.read_text(encoding="utf-8") if keys.is_file() else ""]
    if (integration / "lmcache_mp_connector.py").is_file():
        files = integration.glob("lmcache_mp_*.py")
        texts.append("".join(file.read_text(encoding="utf-8") for file in files))
    return all("cache_salt" in text for text in texts)
