"""Real vLLM engines in this process, one for each configuration that tests ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read by vLLM when it is imported: the engine core and the worker stay in this process, which
# starts in two seconds instead of sixty and lets a test look inside.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from tests.engine.engine import Engine, end, settle, tiny_engine
from tests.models import make_tiny_model

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module", autouse=True)
def heap_at_rest() -> None:
    """Engines start beside what is settled."""
    settle()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random checkpoint by family, made once a session."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else make_tiny_model(path, family)

    return folder


@pytest.fixture(scope="module")
def shared_engine(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeEngine]:
    """Engines on tiny models, one for each configuration that the module's tests ask for.

    They are handed out idle and with an empty prefix cache. None ends before the module does: an
    engine that ends takes what the others in this process need along.
    """
    engines: dict[str, Engine] = {}

    def get(family: str = "llama", saes: Any = ({},), **arguments: Any) -> Engine:
        key = repr((family, saes, sorted(arguments.items())))
        if key not in engines:
            folder = tmp_path_factory.mktemp("saes")
            with pytest.MonkeyPatch.context() as patch:
                # Whole GiB, over what the engine itself is told: too much for so many of them.
                patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
                engines[key] = tiny_engine(tiny_model(family), folder, saes, **arguments)
        assert engines[key].llm.reset_prefix_cache(), "an earlier test left requests"
        return engines[key]

    yield get
    end(engines.values())


@pytest.fixture
def make_engine(tiny_model: Callable[[str], Path], tmp_path: Path) -> Iterator[MakeEngine]:
    """Start engines on tiny models; they end with the test."""
    engines: list[Engine] = []

    def make(family: str = "llama", saes: Any = ({},), **arguments: Any) -> Engine:
        made = tiny_engine(tiny_model(family), tmp_path, saes, **arguments)
        engines.append(made)
        return made

    yield make
    end(engines)
