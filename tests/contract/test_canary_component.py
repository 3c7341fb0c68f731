"""The component for model canaries fits the overlays: one registry, seen where each setting says, and a way to load."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.overlays import K8S, Object, assert_valid, named, settings_of, with_component

from server.models.registry import VERSIONS
from server.settings import Settings


@pytest.fixture(scope="module", params=["dev", "prod"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return with_component(tmp_path_factory.mktemp("canary"), request.param, "canary")


@pytest.fixture
def settings(objects: list[Object], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in [name for name in os.environ if name.startswith("PRETRADE_")]:
        monkeypatch.delenv(name)
    for name, value in settings_of(objects, "server").items():
        if name != "PRETRADE_SECRETS_DIR":
            monkeypatch.setenv(name, value)
    return Settings()


def replicas(objects: list[Object]) -> dict[str, tuple[Object, Object]]:
    """Container and pod of every TorchServe, by the server's name for it."""
    server = named(objects, "StatefulSet", "server")["spec"]["template"]["spec"]
    found = {"primary": (server["initContainers"][0], server)}
    for name in ("secondary", "challenger"):
        pod = named(objects, "Deployment", f"{name}-torchserve")["spec"]["template"]["spec"]
        found[name] = (pod["containers"][0], pod)
    return found


def test_every_object_is_valid_for_kubernetes(objects: list[Object], tmp_path: Path) -> None:
    assert_valid(objects, tmp_path)


def test_servers_and_replicas_see_one_registry_that_only_servers_write(
    objects: list[Object], settings: Settings
) -> None:
    server = named(objects, "StatefulSet", "server")["spec"]["template"]["spec"]
    claim = named(objects, "PersistentVolumeClaim", "models")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (mount,) = (one for one in server["containers"][0]["volumeMounts"] if one["name"] == "models")
    assert Path(mount["mountPath"]) == settings.replay.model_store
    assert "readOnly" not in mount
    for container, pod in replicas(objects).values():
        (mount,) = (one for one in container["volumeMounts"] if one["name"] == "models")
        assert (mount["mountPath"], mount["subPath"], mount["readOnly"]) == ("/models", VERSIONS, True)
        (volume,) = (one for one in pod["volumes"] if one["name"] == "models")
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert settings.canary.archive_url.format(version="x") == "x.mar", "a file of the folder that TorchServe is given"


def test_every_replica_starts_with_a_version_of_the_registry(objects: list[Object]) -> None:
    versions = settings_of(objects, "models")
    for name, (container, _) in replicas(objects).items():
        (version,) = (one["valueFrom"]["configMapKeyRef"] for one in container["env"] if one["name"] == "VERSION")
        assert version["name"].startswith("models-")
        assert version["key"] == ("CHALLENGER" if name == "challenger" else "CHAMPION")
        assert version["key"] in versions
        assert container["args"][1].endswith("=$(VERSION).mar")


def test_servers_and_nobody_else_load_models_into_every_pod(objects: list[Object], settings: Settings) -> None:
    management = {str(name): address for name, address in settings.replicas.management.items()}
    for name, (container, _) in replicas(objects).items():
        host, _, port = management[name].partition(":")
        assert {"name": "management", "containerPort": int(port)} in container["ports"]
        if name == "primary":
            assert host == "127.0.0.1"
            continue
        service = named(objects, "Service", host)["spec"]
        assert service["clusterIP"] == "None", "else one pod of several would be given the version"
        assert [(one["port"], one["targetPort"]) for one in service["ports"]] == [(int(port), "management")]
        labels = named(objects, "Deployment", f"{name}-torchserve")["spec"]["template"]["metadata"]["labels"]
        assert service["selector"].items() <= labels.items()
    open_to = [
        rule
        for policy in objects
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"].get("ingress", ())
        if {"port": int(port)} in rule.get("ports", ())
    ]
    assert open_to == [
        {"from": [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "server"}}}], "ports": [{"port": 7071}]}
    ]


def test_torchserve_is_configured_as_without_canaries_but_that_models_may_be_loaded() -> None:
    usual, loading = (
        {line for line in (K8S / path).read_text().splitlines() if not line.startswith("#")}
        for path in ("torchserve/config.properties", "components/canary/config.properties")
    )
    assert loading - usual == {
        "grpc_management_address=0.0.0.0",
        "grpc_management_port=7071",
        "enable_model_api=true",
    }
    assert len(usual - loading) == 3
