"""The component that puts TLS on the decision servers fits the overlays and the settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from server.settings import Settings

_K8S: Final = Path(__file__).parents[2] / "k8s"


def rendered(directory: Path, overlay: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The objects of an overlay with the component, by kind and name without the hash of its contents."""
    base, component = (os.path.relpath(_K8S / path, directory) for path in (f"overlays/{overlay}", "components/tls"))
    kustomization = {"kind": "Kustomization", "resources": [base], "components": [component]}
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    argv = [
        str(Path(sys.executable).with_name("kubectl")),
        "kustomize",
        "--load-restrictor",
        "LoadRestrictionsNone",
        ".",
    ]
    text = subprocess.run(argv, cwd=directory, capture_output=True, text=True, timeout=60, check=True).stdout
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_servers_speak_tls_and_probes_need_not(tmp_path: Path, overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = rendered(tmp_path, overlay)
    settings = next(
        one["data"] for (kind, name), one in objects.items() if kind == "ConfigMap" and name.startswith("server-")
    )
    for name in [name for name in os.environ if name.startswith("PRETRADE_")]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        if name != "PRETRADE_SECRETS_DIR":
            monkeypatch.setenv(name, value)
    found = Settings()
    server = objects["StatefulSet", "server"]["spec"]["template"]["spec"]
    container = next(one for one in server["containers"] if one["name"] == "server")
    assert found.tls.certificate is not None
    mount = next(one for one in container["volumeMounts"] if one["name"] == "tls")
    assert found.tls.certificate.parent == Path(mount["mountPath"])
    volume = next(one for one in server["volumes"] if one["name"] == "tls")
    assert volume["secret"] == {"secretName": "pretrade-tls", "defaultMode": 0o440}
    probes = {container[probe]["grpc"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {found.grpc.health_port}
    assert found.grpc.health_port in {port["containerPort"] for port in container["ports"]}
    (decision,) = (one for one in objects["Service", "pretrade"]["spec"]["ports"] if one["name"] == "decision")
    assert decision["appProtocol"] == "https"
