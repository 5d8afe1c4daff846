"""deploy/compose.yaml, as far as that shows without a container engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.commands.demo import DEMO_SAE
from server.commands.demo_model import CONVERSION, PACKAGE_VERSION
from tests.deploy.conftest import DEPLOY, REPOSITORY, read_yaml

SITE_PACKAGES = Path("/opt/vllm-sae/lib/python3.11/site-packages")


@pytest.fixture
def services() -> dict[str, Any]:
    return dict(read_yaml(DEPLOY / "compose.yaml")["services"])


def test_server_takes_the_model_that_the_conversion_leaves(services: dict[str, Any]) -> None:
    assert services["demo-model"]["entrypoint"] == ["python3", "-m", "server.commands.demo_model"]
    serve, model, *_ = services["server"]["command"]
    folder = f"SmolLM2-135M-Instruct-{PACKAGE_VERSION}-{CONVERSION}"
    assert (serve, model) == ("serve", f"/var/cache/vllm-sae/vllm-sae/{folder}")


def test_server_takes_the_sae_that_ships_with_the_package(services: dict[str, Any]) -> None:
    shipped = SITE_PACKAGES / DEMO_SAE.relative_to(REPOSITORY)
    assert f"--sae=l14={shipped}" in services["server"]["command"]


def test_requests_get_their_time_to_end(services: dict[str, Any]) -> None:
    server = services["server"]
    (drain,) = (word for word in server["command"] if word.startswith("--shutdown-timeout="))
    assert int(drain.partition("=")[2]) < int(server["stop_grace_period"].removesuffix("s"))


def test_secrets_have_to_be_given(services: dict[str, Any]) -> None:
    assert services["server"]["environment"]["VLLM_API_KEY"].startswith("${VLLM_API_KEY:?")
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith(
        "${GRAFANA_PASSWORD:?"
    )


def test_ports_open_on_loopback_alone(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_every_service_drops_its_capabilities(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_mounted_files_and_volumes_exist(services: dict[str, Any]) -> None:
    volumes = read_yaml(DEPLOY / "compose.yaml")["volumes"]
    for service in services.values():
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            assert (DEPLOY / source).is_dir() if source.startswith(".") else source in volumes
