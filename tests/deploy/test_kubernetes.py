"""The manifests: every reference finds what it names, and no pod has rights it does not need."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import DEPLOY, read_yaml
from tests.deploy.watching import vllm_series

KUBERNETES = DEPLOY / "kubernetes"
FOLDERS = (KUBERNETES, KUBERNETES / "weights")


@pytest.fixture
def manifests() -> dict[str, Any]:
    """Every resource that the two kustomizations list, by its kind."""
    return {
        manifest["kind"]: manifest
        for folder in FOLDERS
        for name in read_yaml(folder / "kustomization.yaml")["resources"]
        for manifest in [read_yaml(folder / name)]
    }


@pytest.fixture
def pod(manifests: dict[str, Any]) -> Any:
    return manifests["Deployment"]["spec"]["template"]


@pytest.fixture
def server(pod: Any) -> Any:
    (container,) = pod["spec"]["containers"]
    return container


def test_every_manifest_is_listed() -> None:
    for folder in FOLDERS:
        listed = set(read_yaml(folder / "kustomization.yaml")["resources"])
        there = {path.name for path in folder.glob("*.yaml")}
        # The chart's values are Helm's to read.
        assert there - listed <= {"kustomization.yaml", "prometheus-adapter.yaml"}
        assert listed <= there


def test_selectors_find_the_server(manifests: dict[str, Any], pod: Any) -> None:
    labels = pod["metadata"]["labels"]
    assert manifests["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == manifests["Deployment"]["metadata"]["name"]
    assert "replicas" not in manifests["Deployment"]["spec"]


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_pods_run_without_rights(manifests: dict[str, Any], kind: str) -> None:
    spec = manifests[kind]["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/tmp", "/var/cache/vllm-sae"} <= mounted


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_mounts_are_of_volumes_that_exist(manifests: dict[str, Any], kind: str) -> None:
    spec = manifests[kind]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    claim = manifests["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["weights"]["persistentVolumeClaim"]["claimName"] == claim
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)


def test_both_read_what_is_served_from_one_place(manifests: dict[str, Any]) -> None:
    served = read_yaml(KUBERNETES / "served.yaml")
    for kind in ("Deployment", "Job"):
        text = yaml.safe_dump(manifests[kind])
        assert f"name: {served['metadata']['name']}" in text
        assert set(re.findall(r"\$\((\w+)\)", text)) <= set(served["data"])


def test_presets_are_read_where_they_are_mounted(pod: Any, server: Any) -> None:
    presets = read_yaml(KUBERNETES / "presets.yaml")
    (mount,) = (each for each in server["volumeMounts"] if each["name"] == "presets")
    assert f"--steering-presets={mount['mountPath']}" in server["args"]
    (volume,) = (each for each in pod["spec"]["volumes"] if each["name"] == "presets")
    assert volume["configMap"]["name"] == presets["metadata"]["name"]


def test_probes_ask_for_health(server: Any) -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}


def test_a_pod_has_time_to_drain(pod: Any, server: Any) -> None:
    (drain,) = (word for word in server["args"] if word.startswith("--shutdown-timeout="))
    _, before = server["lifecycle"]["preStop"]["exec"]["command"]
    needed = int(drain.partition("=")[2]) + int(before)
    assert pod["spec"]["terminationGracePeriodSeconds"] > needed


def test_no_key_is_in_the_manifests(server: Any) -> None:
    (key,) = (variable for variable in server["env"] if variable["name"] == "VLLM_API_KEY")
    assert key["valueFrom"]["secretKeyRef"]["key"] == "VLLM_API_KEY"
    assert not [
        path for path in KUBERNETES.rglob("*.yaml") if read_yaml(path).get("kind") == "Secret"
    ]


def test_service_links_do_not_look_like_vllms_variables(pod: Any) -> None:
    assert pod["spec"]["enableServiceLinks"] is False


def test_autoscaler_follows_the_queue(manifests: dict[str, Any]) -> None:
    (metric,) = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = read_yaml(KUBERNETES / "prometheus-adapter.yaml")["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert rule["seriesQuery"].partition("{")[0] in vllm_series()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_kustomize_builds_what_the_schemas_accept(
    folder: Path, tool: Callable[[str], str], tmp_path: Path
) -> None:
    built = subprocess.run(
        [tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    images = set(re.findall(r"image: (.*)", built.stdout))
    assert images == {"vllm-sae:cuda"}
    (tmp_path / "built.yaml").write_text(built.stdout, encoding="utf-8")
    validated = subprocess.run(
        [tool("kubernetes-validate"), "--strict", str(tmp_path / "built.yaml")],
        capture_output=True,
        text=True,
    )
    assert validated.returncode == 0, validated.stdout + validated.stderr
