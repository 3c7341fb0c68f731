"""The component that puts TLS on the decision servers fits the overlays and the settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.overlays import named, settings_of, with_component

from server.settings import Settings


def test_servers_speak_tls_and_probes_need_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = with_component(tmp_path, "dev", "tls")  # prod has it
    for name in [name for name in os.environ if name.startswith("PRETRADE_")]:
        monkeypatch.delenv(name)
    for name, value in settings_of(objects, "server").items():
        if name != "PRETRADE_SECRETS_DIR":
            monkeypatch.setenv(name, value)
    found = Settings()
    server = named(objects, "StatefulSet", "server")["spec"]["template"]["spec"]
    container = next(one for one in server["containers"] if one["name"] == "server")
    assert found.tls.certificate is not None
    mount = next(one for one in container["volumeMounts"] if one["name"] == "tls")
    assert found.tls.certificate.parent == Path(mount["mountPath"])
    volume = next(one for one in server["volumes"] if one["name"] == "tls")
    assert volume["secret"] == {"secretName": "pretrade-tls", "defaultMode": 0o440}
    probes = {container[probe]["grpc"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {found.grpc.health_port}
    assert found.grpc.health_port in {port["containerPort"] for port in container["ports"]}
    (decision,) = (one for one in named(objects, "Service", "pretrade")["spec"]["ports"] if one["name"] == "decision")
    assert decision["appProtocol"] == "https"
