"""The component for feature sets of a stranger fits the overlays, and so does its counterpart for Compose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
import yaml
from support.overlays import K8S, Object, assert_valid, named, with_component

from feature_cache.feature_sets import FILE_VARIABLE, FeatureSets, of_file
from feature_cache.worker.settings import PREFIX, WorkerSettings

PAGE: Final = K8S.parent / "docs/feature-sets.md"
PODS: Final = (("StatefulSet", "server", FILE_VARIABLE), ("Deployment", "worker", f"{PREFIX}FEATURES_FILE"))
OVERRIDE: Final = yaml.safe_load((K8S.parent / "compose.features.yaml").read_text())["services"]


@pytest.fixture(scope="module", params=["dev", "prod"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return with_component(tmp_path_factory.mktemp("features"), request.param, "features")


def test_every_object_is_valid_for_kubernetes(objects: list[Object], tmp_path: Path) -> None:
    assert_valid(objects, tmp_path)


@pytest.mark.parametrize(("kind", "name", "variable"), PODS)
def test_the_file_is_mounted_where_the_setting_says_and_a_changed_one_rolls_the_pods(
    objects: list[Object], kind: str, name: str, variable: str
) -> None:
    maps = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
    pod = named(objects, kind, name)["spec"]["template"]["spec"]
    (container,) = (one for one in pod["containers"] if one["name"] == name)
    given = [maps[one["configMapRef"]["name"]] for one in container["envFrom"]]
    (path,) = (Path(one[variable]) for one in given if variable in one)
    (mount,) = (one for one in container["volumeMounts"] if Path(one["mountPath"]) == path.parent)
    assert mount["readOnly"] is True
    (volume,) = (one for one in pod["volumes"] if one["name"] == mount["name"])
    assert re.search("features-[a-z0-9]{10}", volume["configMap"]["name"]), "with a hash of the file in it"
    assert path.name in maps[volume["configMap"]["name"]]


def test_the_file_is_the_example_of_the_page_and_a_worker_and_a_server_take_it() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    file = K8S / "components/features/sets.py"
    assert file.read_text() == example
    assert [one.feature_set.id for one in FeatureSets(of_file(file))] == ["mf1", "numbers"]
    assert "features_file" in WorkerSettings.model_fields


def test_compose_mounts_the_file_where_the_settings_say() -> None:
    services = yaml.safe_load((K8S.parent / "compose.yaml").read_text())["services"]
    assert OVERRIDE.keys() == {name for _, name, _ in PODS} <= services.keys()
    for _, name, variable in PODS:
        ((given, path),) = OVERRIDE[name]["environment"].items()
        assert given == variable
        assert OVERRIDE[name]["volumes"] == [f"${{SETS:?a Python file with feature sets}}:{path}:ro"]
        assert given not in services[name]["environment"]
