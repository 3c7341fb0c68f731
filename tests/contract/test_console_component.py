"""The component with the console fits the overlays: it holds up no server, has no credentials, and starts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from support.overlays import Object, assert_valid, named, settings_of, with_component

from local.stack.ports import is_free
from pretrade.client.credential_variables import TOKEN, TOKEN_FILE
from pretrade.console.cli import PORT


@pytest.fixture(scope="module", params=["dev", "prod"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return with_component(tmp_path_factory.mktemp("console"), request.param, "console")


def pod(objects: list[Object]) -> Object:
    found: Object = named(objects, "StatefulSet", "server")["spec"]["template"]["spec"]
    return found


def console(objects: list[Object]) -> Object:
    (found,) = (one for one in pod(objects)["initContainers"] if one["name"] == "console")
    assert isinstance(found, dict)
    return found


def test_every_object_is_valid_for_kubernetes(objects: list[Object], tmp_path: Path) -> None:
    assert_valid(objects, tmp_path)


def test_it_keeps_no_server_from_starting_or_serving(objects: list[Object]) -> None:
    sidecar = console(objects)
    assert sidecar["restartPolicy"] == "Always", "a native sidecar"
    assert not {"startupProbe", "readinessProbe"} & set(sidecar)
    assert [one["name"] for one in pod(objects)["containers"]] == ["server"]


def test_it_has_neither_credentials_nor_the_servers_files_nor_its_user(objects: list[Object]) -> None:
    sidecar = console(objects)
    assert not set(settings_of(objects, "console")) & {TOKEN, TOKEN_FILE}
    assert [one["name"] for one in sidecar["volumeMounts"]] == ["console-tmp"]
    users = {
        one["securityContext"].get("runAsUser")
        for one in (*pod(objects)["containers"], *pod(objects)["initContainers"])
    }
    assert sidecar["securityContext"]["runAsUser"] not in {pod(objects)["securityContext"]["runAsUser"], None, 0}
    assert len(users) == 3, "server, primary and console each have their own"
    assert sidecar["securityContext"]["readOnlyRootFilesystem"]
    assert sidecar["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_it_is_of_the_servers_image_and_starts_with_its_settings(objects: list[Object]) -> None:
    sidecar = console(objects)
    (server,) = pod(objects)["containers"]
    assert sidecar["image"] == server["image"]
    given = settings_of(objects, "console")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
    # It starts, and says where it would listen: somebody else listens there.
    with socket.create_server(("127.0.0.1", PORT)) if is_free(PORT) else nullcontext():
        command = [sys.executable, "-m", "local", *sidecar["command"][1:]]
        done = subprocess.run(command, env=clean | given, capture_output=True, text=True, check=False, timeout=60)
    assert f"cannot listen on 127.0.0.1:{PORT}" in done.stderr
    assert f"127.0.0.1:{PORT}/health" in sidecar["livenessProbe"]["exec"]["command"][-1]
    assert not re.search(r"\b7020\b", yaml.safe_dump(named(objects, "Service", "pretrade"))), "no service leads to it"


def test_it_and_alertmanager_may_talk_where_there_is_one(tmp_path: Path) -> None:
    objects = with_component(tmp_path, "dev", "alerting", "console")
    egress = named(objects, "NetworkPolicy", "server")["spec"]["egress"]
    ingress = named(objects, "NetworkPolicy", "alertmanager")["spec"]["ingress"]
    to = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "alertmanager"}}}
    of = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "server"}}}
    assert any(to in rule["to"] and {"port": 9093} in rule["ports"] for rule in egress)
    assert any(of in rule["from"] and {"port": 9093} in rule["ports"] for rule in ingress)
