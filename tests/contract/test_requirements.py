"""What the images and CI install: every package in one version, by its hashes, as pyproject.toml wants it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[2]
LOCKS: Final = {path.stem: path for path in sorted((ROOT / "requirements").glob("*.txt"))}
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: Final[dict[str, list[str]]] = PROJECT["project"]["optional-dependencies"]
CLIENT: Final[dict[str, Any]] = tomllib.loads((ROOT / "client/pyproject.toml").read_text())
_ENTRY: Final = re.compile(r"(?m)^([a-z0-9][a-z0-9._-]*)==([^\s;]+)(?: ; [^\n\\]+)? \\\n((?:    --hash=[^\n]+\n?)+)")
_OF_TORCH: Final = re.compile(r"torch|triton|nvidia-.+|cuda-.+")


def entries(name: str) -> dict[str, set[str]]:
    """The versions of every package in a lock; some have two, by the version of Python."""
    found: dict[str, set[str]] = {}
    for package, version, _ in _ENTRY.findall(LOCKS[name].read_text()):
        found.setdefault(package, set()).add(version)
    return found


def wanted(extra: str) -> list[Requirement]:
    """The direct dependencies of the client, of an extra, and of those it names."""
    found = [Requirement(pin) for pin in CLIENT["project"]["dependencies"]]
    for pin in EXTRAS[extra]:
        requirement = Requirement(pin)
        if requirement.name == "pretrade-server":
            found += [inner for name in requirement.extras for inner in wanted(name)]
        elif requirement.name == "pretrade":
            found += [Requirement(one) for one in CLIENT["project"]["optional-dependencies"]["console"] if "==" in one]
        else:
            found.append(requirement)
    return found


def test_there_is_a_lock_for_each_image_and_for_ci() -> None:
    assert set(LOCKS) == {"build", "deploy", "dev", "server", "torch", "torchserve", "worker"}


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_hashes_and_nothing_says_where_it_is_from(name: str) -> None:
    text = LOCKS[name].read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    packages = [line for line in lines if not line.startswith("    ")]
    assert len(packages) == len(_ENTRY.findall(text))
    for _, _, hashes in _ENTRY.findall(text):
        assert re.fullmatch(r"(    --hash=sha256:[0-9a-f]{64}(?: \\)?\n?)+", hashes)
    assert not re.search(r"(?i)://|index|find-links|trusted|file:|@|\.(org|com|io|net)\b", "\n".join(lines))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("server", "worker"),
        ("server", "ta"),
        ("server", "embedded"),
        ("server", "envoy"),
        ("worker", "worker"),
        ("worker", "ta"),
        ("worker", "export"),
        ("build", "compile"),
        ("dev", "dev"),
        ("deploy", "deploy"),
        ("torchserve", None),
    ],
)
def test_the_lock_is_of_the_pins_in_pyproject(name: str, extra: str | None) -> None:
    """Else `make lock` was forgotten."""
    found = entries(name) | entries("torch")
    if extra is None:
        serving = re.findall(r"SERVING: Final = \(([^)]+)\)", (ROOT / ".ci/lock").read_text())[0]
        names = re.findall(r'"([^"]+)"', serving)
        pins = [one for one in wanted("models") + wanted("local") if one.name in names]
        assert {one.name for one in pins} == set(names)
        pins += map(Requirement, CLIENT["project"]["dependencies"])
    else:
        pins = wanted(extra) if name != "build" else [Requirement(pin) for pin in EXTRAS[extra]]
    for pin in pins:
        assert pin.specifier.contains(next(iter(found[canonicalize_name(pin.name)])), prereleases=True), pin


@pytest.mark.parametrize("project", [PROJECT, CLIENT], ids=["pretrade-server", "pretrade"])
def test_the_wheel_is_built_by_what_pyproject_names(project: dict[str, Any]) -> None:
    for pin in project["build-system"]["requires"]:
        package, _, version = pin.partition("==")
        assert entries("build")[package] == {version}


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("server", "worker"),
        ("server", "ta"),
        ("server", "envoy"),
        ("worker", "worker"),
        ("worker", "ta"),
        ("worker", "export"),
        ("dev", "dev"),
    ],
)
def test_the_lock_is_whole(name: str, extra: str) -> None:
    """All that is asked for by what is asked for, as far as it is installed here, is in it: pip looks for no more."""
    locked = set(entries(name)) | set(entries("torch"))
    seen: set[tuple[str, str]] = set()
    left = [(one.name, found) for one in wanted(extra) for found in (one.extras or {""})]
    while left:
        package, chosen = left.pop()
        if (package, chosen) in seen:
            continue
        seen.add((package, chosen))
        assert canonicalize_name(package) in locked, package
        try:
            requires = distribution(package).requires or []
        except PackageNotFoundError:
            continue
        for one in map(Requirement, requires):
            environment = {**default_environment(), "extra": chosen}
            if _OF_TORCH.fullmatch(canonicalize_name(one.name)):
                continue
            if one.marker is None or one.marker.evaluate(environment):  # type: ignore[arg-type]  # of strings
                left += [(one.name, found) for found in (one.extras or {""})]


def test_pytorch_is_in_a_file_of_its_own() -> None:
    """Its build on PyPI brings CUDA; who takes another one leaves the file out and keeps every other hash."""
    assert entries("torch")["torch"] == {"2.13.0"}
    assert all(_OF_TORCH.fullmatch(package) for package in entries("torch"))
    for name in set(LOCKS) - {"torch"}:
        assert not [package for package in entries(name) if _OF_TORCH.fullmatch(package)], name


@pytest.mark.parametrize("path", sorted((ROOT / "k8s/docker").glob("*.Dockerfile")), ids=lambda path: path.stem)
def test_an_image_takes_nothing_without_its_hash_but_a_pytorch_that_was_chosen(path: Path) -> None:
    text = re.sub(r"\\\n", "", re.sub(r"(?m)^\s*#.*\n", "", path.read_text()))
    installs = re.findall(r"pip install [^&;]+", text)
    assert installs
    for install in installs:
        own_wheel = "/dist/*.whl" in install and "--no-deps" in install
        chosen = "^torch==" in install and "--no-deps" in install
        named = re.search(r"--no-deps --require-hashes --requirement (requirements/\w+\.txt)", install)
        assert own_wheel or chosen or (named and (ROOT / named[1]).exists()), install
    assert "pip check" in text
    assert "--no-build-isolation" in text
    assert "!requirements" in (path.parent / f"{path.name}.dockerignore").read_text().splitlines()


def test_ci_installs_by_hashes() -> None:
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for command in (step.get("run", "") for step in job["steps"]):
                for line in command.splitlines():
                    if re.search(r"\bmake (setup|check-deploy)\b", line):
                        assert "LOCKED=1" in line, (path.name, line)
                    if "pip install" in line and "/tmp/caller" not in line:  # which is what a caller does
                        assert "--require-hashes" in line, (path.name, line)


def test_a_package_that_is_not_what_was_locked_is_refused(tmp_path: Path) -> None:
    """By pip itself, with a lock of ours and a file that somebody else has made."""
    import zipfile  # noqa: PLC0415

    with zipfile.ZipFile(tmp_path / "pyjwt-2.15.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("jwt/__init__.py", "raise SystemExit('forged')\n")
        info = "pyjwt-2.15.1.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pyjwt\nVersion: 2.15.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (entry,) = re.findall(r"(?m)^pyjwt==.*\\\n(?:    --hash.*\n)+", LOCKS["server"].read_text())
    (tmp_path / "lock.txt").write_text(entry)
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(tmp_path), "--no-deps"]
    command += ["--target", str(tmp_path / "target"), "--require-hashes", "--requirement", str(tmp_path / "lock.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "DO NOT MATCH" in done.stderr
    assert not (tmp_path / "target").exists()
