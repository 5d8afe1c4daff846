from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import vllm.plugins
from fastapi.testclient import TestClient

from sae.source import ResolvedSAE
from server.plugin import SteeringEndpointPlugin
from steering.config import LEAST_MAX_READ_VALUES, SteeringConfig
from tests.models import D_MODEL, NUM_LAYERS, make_tiny_sae
from tests.server.fakes import FakeEngine, Recorder, make_app


@dataclass
class Server:
    """An app with no engine behind it, and what its handlers saw."""

    client: TestClient
    recorder: Recorder


StartServer = Callable[..., Server]


@pytest.fixture
def references(tmp_path: Path) -> Callable[..., tuple[ResolvedSAE, ...]]:
    """Write SAEs `NAME={settings of make_tiny_sae}` and refer to them."""

    def write(**saes: dict[str, Any]) -> tuple[ResolvedSAE, ...]:
        paths = {name: make_tiny_sae(tmp_path / name, **how) for name, how in saes.items()}
        return tuple(
            ResolvedSAE(name=name, source=str(path), path=str(path)) for name, path in paths.items()
        )

    return write


@pytest.fixture
def start(
    references: Callable[..., tuple[ResolvedSAE, ...]], monkeypatch: pytest.MonkeyPatch
) -> StartServer:
    """Start an app with these SAEs (one, `a`, unless told), these flags and limits."""
    monkeypatch.setattr(
        vllm.plugins, "load_endpoint_plugins", lambda tasks: [SteeringEndpointPlugin()]
    )

    def run(
        *flags: str,
        saes: dict[str, Any] | None = None,
        stats: Any = (),
        model_config: Any = None,
        max_body_bytes: int | None = None,
        max_read_values: int = LEAST_MAX_READ_VALUES,
        options: Mapping[str, Any] | None = None,
        special_token_ids: tuple[int, ...] | None = None,
    ) -> Server:
        refs = references(**({"a": {}} if saes is None else saes))
        config = (
            SteeringConfig(
                refs, D_MODEL, NUM_LAYERS, special_token_ids, max_read_values=max_read_values
            )
            if refs
            else None
        )
        engine = FakeEngine(config, model_config)
        engine.stats = list(stats)
        app, recorder = asyncio.run(
            make_app(config, *flags, engine=engine, max_body_bytes=max_body_bytes, options=options)
        )
        return Server(TestClient(app, raise_server_exceptions=False), recorder)

    return run


@pytest.fixture
def server(start: StartServer) -> Server:
    return start()
