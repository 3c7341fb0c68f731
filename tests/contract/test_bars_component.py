"""The component that keeps bars fits the overlays: its settings are taken, and it reaches what it needs and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.overlays import K8S, Object, assert_valid, named, settings_of, with_component

from feature_cache.bars.settings import PREFIX, BarsSettings
from feature_cache.ta1 import settings as ta1


@pytest.fixture(scope="module", params=["dev", "prod"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return with_component(tmp_path_factory.mktemp("bars"), request.param, "bars")


def container(objects: list[Object], name: str) -> Object:
    (found,) = named(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def secrets(objects: list[Object], name: str) -> dict[str, str]:
    """Variable of a container, and the key of the Secret that it comes from."""
    keyed = (one for one in container(objects, name)["env"] if "secretKeyRef" in one.get("valueFrom", {}))
    return {one["name"]: one["valueFrom"]["secretKeyRef"]["key"] for one in keyed}


def reached(objects: list[Object], name: str) -> set[tuple[str, int]]:
    """Whom a pod may call, by its policy."""
    rules = named(objects, "NetworkPolicy", name)["spec"]["egress"]
    return {
        (peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"], port["port"])
        for rule in rules
        for peer in rule["to"]
        for port in rule["ports"]
    }


def test_every_object_is_valid_for_kubernetes(objects: list[Object], tmp_path: Path) -> None:
    assert_valid(objects, tmp_path)


def test_the_keeper_runs_from_the_workers_image_with_settings_that_it_takes(objects: list[Object]) -> None:
    keeper = container(objects, "bars")
    assert keeper["image"] == container(objects, "worker")["image"]
    assert keeper["command"] == ["python", "-m", "feature_cache.bars"]
    assert secrets(objects, "bars") == {f"{PREFIX}DATABASE_URL": "database-url"}
    given = {name.removeprefix(PREFIX).lower(): value for name, value in settings_of(objects, "bars").items()}
    taken = BarsSettings.model_validate(given | {"database_url": "postgresql+psycopg://me@postgresql/pretrade"})
    assert [port["containerPort"] for port in keeper["ports"]] == [taken.metrics_port]
    assert named(objects, "Service", "bars")["spec"]["ports"][0]["port"] == taken.metrics_port
    assert taken.metrics_host == "0.0.0.0"


def test_the_worker_finds_the_bars_where_the_keeper_writes_them(objects: list[Object]) -> None:
    variable = f"{ta1.PREFIX}BARS_DATABASE_URL"
    assert variable.removeprefix(ta1.PREFIX).lower() in ta1.Ta1Settings.model_fields
    assert secrets(objects, "worker")[variable] == secrets(objects, "bars")[f"{PREFIX}DATABASE_URL"]
    assert ("postgresql", 5432) in reached(objects, "worker")


def test_the_keeper_reaches_kafka_and_the_database_and_nobody_else(objects: list[Object]) -> None:
    assert reached(objects, "bars") == {("kafka", 9092), ("kafka", 9094), ("postgresql", 5432)}
    (rule,) = named(objects, "NetworkPolicy", "dns")["spec"]["podSelector"]["matchExpressions"]
    assert "bars" in rule["values"]
    pod = named(objects, "Deployment", "bars")["spec"]["template"]
    policy = named(objects, "NetworkPolicy", "bars")["spec"]["podSelector"]["matchLabels"]
    assert policy.items() <= pod["metadata"]["labels"].items()
    assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "pretrade", "else everything is let through"


def test_the_keeper_is_confined(objects: list[Object]) -> None:
    security = container(objects, "bars")["securityContext"]
    assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True)
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_the_operator_scrapes_the_keeper(objects: list[Object]) -> None:
    scrapes = yaml.safe_load_all((K8S / "components/monitoring/scrape.yaml").read_text())
    (monitor,) = (one for one in scrapes if one["metadata"]["name"] == "pretrade-bars")
    service = named(objects, "Service", "bars")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
