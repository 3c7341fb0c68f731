"""The component for a pool by DNS fits the overlays: a name with every pod's address, and a setting that says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.overlays import Object, assert_valid, named, settings_of, with_component

from server.settings import Settings


@pytest.fixture(scope="module", params=["dev", "prod"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return with_component(tmp_path_factory.mktemp("pool"), request.param, "pool")


def test_every_object_is_valid_for_kubernetes(objects: list[Object], tmp_path: Path) -> None:
    assert_valid(objects, tmp_path)


def test_servers_look_up_a_name_with_the_address_of_every_pod(
    objects: list[Object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PRETRADE_")]:
        monkeypatch.delenv(name)
    for name, value in settings_of(objects, "server").items():
        if name != "PRETRADE_SECRETS_DIR":
            monkeypatch.setenv(name, value)
    host, _, port = Settings().replicas.each("secondary").partition(":")
    service = named(objects, "Service", host)["spec"]
    assert service["clusterIP"] == "None", "else the name has one address"
    assert not service.get("publishNotReadyAddresses")
    pod = named(objects, "Deployment", "secondary-torchserve")["spec"]["template"]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    (reached,) = (one for one in service["ports"] if one["port"] == int(port))
    (container,) = pod["spec"]["containers"]
    assert {"name": reached["targetPort"], "containerPort": int(port)} in container["ports"]
