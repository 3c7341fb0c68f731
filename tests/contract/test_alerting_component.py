"""The component with Alertmanager fits the overlays: it finds configuration and secrets, and reaches only who tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.overlays import K8S, Object, assert_valid, named, settings_of, with_component

SOURCE = K8S / "observability" / "alertmanager"


@pytest.fixture(scope="module", params=["dev", "prod"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return with_component(tmp_path_factory.mktemp("alerting"), request.param, "alerting")


def pod(objects: list[Object]) -> Object:
    template: Object = named(objects, "StatefulSet", "alertmanager")["spec"]["template"]
    return template


def container(objects: list[Object]) -> Object:
    (found,) = pod(objects)["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_every_object_is_valid_for_kubernetes(objects: list[Object], tmp_path: Path) -> None:
    assert_valid(objects, tmp_path)


def test_the_configuration_is_the_one_of_compose(objects: list[Object]) -> None:
    files = (SOURCE / "alertmanager.yaml", SOURCE / "templates" / "pretrade.tmpl")
    assert settings_of(objects, "alertmanager") == {path.name: path.read_text() for path in files}, (
        "run .ci/prometheus-rules"
    )


def test_configuration_templates_and_secrets_are_where_alertmanager_looks(objects: list[Object]) -> None:
    mounted = {mount["name"]: mount["mountPath"] for mount in container(objects)["volumeMounts"]}
    (configuration,) = (one for one in container(objects)["args"] if one.startswith("--config.file="))
    assert configuration == f"--config.file={mounted['configuration']}/alertmanager.yaml"
    (volume,) = (one for one in pod(objects)["spec"]["volumes"] if one["name"] == "configuration")
    paths = {item["path"] for item in volume["configMap"]["items"]}
    loaded = yaml.safe_load((SOURCE / "alertmanager.yaml").read_text())
    assert {Path(path).parent / "*.tmpl" for path in paths if path.endswith(".tmpl")} == set(
        map(Path, loaded["templates"])
    )
    assert loaded["global"]["smtp_auth_password_file"].startswith(f"{mounted['secrets']}/")


def test_it_is_the_version_of_compose(objects: list[Object]) -> None:
    services = yaml.safe_load((K8S.parent / "compose.yaml").read_text())["services"]
    assert f":-{container(objects)['image']}}}" in services["alertmanager"]["image"]


def test_each_pod_knows_the_others(objects: list[Object]) -> None:
    """Otherwise each would notify."""
    replicas = named(objects, "StatefulSet", "alertmanager")["spec"]["replicas"]
    peers = {one for one in container(objects)["args"] if one.startswith("--cluster.peer=")}
    assert peers == {f"--cluster.peer=alertmanager-{number}.alertmanager:9094" for number in range(replicas)}
    ports = {port["port"] for port in named(objects, "Service", "alertmanager")["spec"]["ports"]}
    assert ports == {port["containerPort"] for port in container(objects)["ports"]} == {9093, 9094}


def test_only_monitoring_and_its_peers_reach_it(objects: list[Object]) -> None:
    policy = named(objects, "NetworkPolicy", "alertmanager")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= pod(objects)["metadata"]["labels"].items()
    http, peers = policy["ingress"]
    assert http["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert peers["from"] == [{"podSelector": policy["podSelector"]}]
    (rule,) = named(objects, "NetworkPolicy", "dns")["spec"]["podSelector"]["matchExpressions"]
    assert "alertmanager" in rule["values"]
    assert pod(objects)["metadata"]["labels"]["app.kubernetes.io/part-of"] == "pretrade", "else nothing is kept out"


def test_it_is_confined(objects: list[Object]) -> None:
    assert pod(objects)["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container(objects)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
