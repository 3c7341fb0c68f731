"""Renders the overlays of `k8s/` as a cluster would get them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import yaml

K8S: Final = Path(__file__).parents[2] / "k8s"

Object = dict[str, Any]


def with_component(directory: Path, overlay: str, *components: str) -> list[Object]:
    """The objects of an overlay that lists some components more; `directory` is for a copy of the files."""
    copy = shutil.copytree(K8S, directory / "k8s", ignore=shutil.ignore_patterns("terraform", ".terraform"))
    path = copy / "overlays" / overlay / "kustomization.yaml"
    kustomization = yaml.safe_load(path.read_text())
    more = [f"../../components/{component}" for component in components]
    kustomization["components"] = [*kustomization.get("components", ()), *more]
    path.write_text(yaml.safe_dump(kustomization))
    kubectl = str(Path(sys.executable).with_name("kubectl"))
    done = subprocess.run([kubectl, "kustomize", path.parent], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def assert_valid(objects: list[Object], directory: Path) -> None:
    """Every object is one that Kubernetes takes; `directory` is for a file with them."""
    path = directory / "all.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    validate = [
        str(Path(sys.executable).with_name("kubernetes-validate")),
        "--strict",
        "--quiet",
        "--no-warn",
        str(path),
    ]
    done = subprocess.run(validate, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def settings_of(objects: list[Object], name: str) -> dict[str, str]:
    """What a generated ConfigMap holds."""
    (found,) = (one for one in objects if one["kind"] == "ConfigMap" and one["metadata"]["name"].startswith(f"{name}-"))
    content: dict[str, str] = found["data"]
    return content


def named(objects: list[Object], kind: str, name: str) -> Object:
    """One object."""
    (found,) = (one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, name))
    return found
