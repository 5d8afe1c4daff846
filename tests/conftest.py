"""What every test gets: an offline process with one thread, the demo's files, and skips of tests
that need a GPU or a hub."""

from __future__ import annotations

import os
from pathlib import Path

# Read when torch, transformers and vLLM are imported, hence first. Two test processes on two
# cores are faster with one thread each, and sums then have one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

import sae
from server.commands.demo_model import ensure_demo_model
from tests.gemma_model import GemmaUnavailableError, ensure_gemma_model
from tests.gpu.device import REHEARSAL

# Wall-clock limits of single examples say more about the machine than about the code.
settings.register_profile("vllm-sae", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same examples on every run: a red build is then the change's doing.
settings.register_profile("ci", settings.get_profile("vllm-sae"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "vllm-sae")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device, `network` or `nightly` unless asked.

    The families of models come last: vLLM's backend for transformers changes the classes of some
    for the rest of the process, and they cannot be made outside of an engine then.
    """
    items.sort(key=lambda item: item.path.name == "test_families.py")
    reasons = {}
    if not (torch.cuda.is_available() or REHEARSAL):
        reasons["gpu"] = "no CUDA device"
    if "network" not in config.option.markexpr:
        reasons["network"] = "run with: HF_HUB_OFFLINE=0 pytest -m network"
    if "nightly" not in config.option.markexpr:
        reasons["nightly"] = "takes minutes; run with: pytest -m nightly"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct's checkpoint, converted when first asked for."""
    return ensure_demo_model()


@pytest.fixture(scope="session")
def gemma_model() -> Path:
    """Folder of Gemma 3 270M's checkpoint, converted when first asked for."""
    try:
        return ensure_gemma_model()
    except GemmaUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def demo_sae() -> Path:
    """Folder of the SAE that ships with the package."""
    return Path(sae.__file__).parent / "demo" / "smollm2-135m-l14"
