"""The workflows run commands that exist, with actions that cannot change under them and no right too many."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

ROOT: Final = Path(__file__).parents[2]
WORKFLOWS: Final = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS: Final = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["jobs"]
    return found


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(path).values():
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_by_commit_and_says_its_version(path: Path) -> None:
    used = re.findall(r"uses: (.+)", path.read_text())
    assert used
    assert [each for each in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each)] == []


def test_an_action_has_one_commit_everywhere() -> None:
    pins = {each for path in WORKFLOWS for each in re.findall(r"uses: (.+)", path.read_text())}
    assert len({each.split("@")[0] for each in pins}) == len(pins)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nothing_may_do_more_than_its_job(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {}
    for name, job in jobs(path).items():
        assert job["permissions"]["contents"] == "read", name
        assert job["timeout-minutes"] <= 120, name
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_target_of_make_and_every_file_that_is_run_exists(path: Path) -> None:
    for step in steps(path):
        command = step.get("run", "")
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= TARGETS
        for file in re.findall(r"\b(tests/[\w/]+\.py)\b", command):
            assert (ROOT / file).exists()


def test_an_image_is_verified_by_the_identity_that_signed_it() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text()
    assert "cosign sign --yes" in text
    assert text.count(".github/workflows/release.yml@$GITHUB_REF") == 2
    assert "cosign verify " in text
    assert "cosign verify-attestation " in text
    matrix = jobs(ROOT / ".github/workflows/release.yml")["image"]["strategy"]["matrix"]["image"]
    assert {f"{image}.Dockerfile" for image in matrix} == {
        path.name for path in (ROOT / "k8s/docker").glob("*.Dockerfile")
    }


def test_dependabot_watches_everything_that_is_pinned() -> None:
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    assert {each["package-ecosystem"] for each in updates} == {"pip", "github-actions", "docker", "docker-compose"}
    for each in updates:
        assert (ROOT / each["directory"].lstrip("/")).is_dir()
