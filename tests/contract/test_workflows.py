"""The workflows run commands that exist, with actions that cannot change under them and no right too many."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from google.protobuf.json_format import MessageToJson
from support import seeds
from support.server_group import EDGES

from pretrade.admin.v1 import admin_pb2

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


def test_the_nightly_run_tries_compiled_modules_under_sanitizers_and_all_without_them() -> None:
    job = jobs(ROOT / ".github/workflows/nightly.yml")["compiled"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert {"make sanitize", "make fuzz SECONDS=300", "make test-plain"} <= set(commands)


def test_the_nightly_run_breaks_both_edges_and_keeps_the_seeds_that_fail() -> None:
    job = jobs(ROOT / ".github/workflows/nightly.yml")["faults"]
    assert job["strategy"]["matrix"]["edge"] == list(EDGES)
    (faults,) = [step["run"] for step in job["steps"] if "make faults" in step.get("run", "")]
    assert "EDGE=${{ matrix.edge }}" in faults
    # As root, whose environment is another one: without CI a skip nobody agreed to would pass.
    assert {"CI", seeds.FILE_VARIABLE} <= set(re.findall(r"[A-Z_]+", faults.partition("make")[0]))
    kept = job["env"][seeds.FILE_VARIABLE]
    assert [step["with"]["path"] for step in job["steps"] if "actions/cache/" in step.get("uses", "")] == [kept, kept]


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
    assert {each["package-ecosystem"] for each in updates} == {
        "pip",
        "github-actions",
        "docker",
        "docker-compose",
        "npm",
        "terraform",
    }
    directories = {one for each in updates for one in each.get("directories", [each.get("directory")])}
    assert all((ROOT / one.lstrip("/")).is_dir() for one in directories)
    assert {"/", "/client"} <= directories, "both distributions"


# --- The contract


def test_every_change_is_held_against_the_contract_of_the_last_release() -> None:
    """With the whole history: in a shallow clone there is no last release to be found."""
    found = [
        (path.stem, list(job["steps"]))
        for path in WORKFLOWS
        for job in jobs(path).values()
        if any(step.get("run") == ".ci/breaking" for step in job["steps"])
    ]
    ((name, steps),) = found
    assert name == "ci", "which runs for every change"
    checkout = next(step for step in steps if step.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"]["fetch-depth"] == 0
    assert "if" not in next(step for step in steps if step.get("run") == ".ci/breaking")


def git(where: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=where, check=True, capture_output=True, timeout=60)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The contract in a repository of its own, without a release."""
    where = tmp_path / "repository"
    where.mkdir()
    git(where, "init", "--quiet")
    shutil.copytree(ROOT / "proto" / "pretrade", where / "proto" / "pretrade", ignore=shutil.ignore_patterns("gen"))
    shutil.copy(ROOT / "buf.yaml", where)
    (where / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "breaking", where / ".ci")
    git(where, "add", ".")
    git(where, "commit", "--quiet", "--message", "first")
    return where


def broken(where: Path) -> subprocess.CompletedProcess[str]:
    """What `.ci/breaking` says."""
    env = os.environ | {"VENV": str(Path(sys.executable).parents[1])}
    return subprocess.run([".ci/breaking"], cwd=where, env=env, capture_output=True, text=True, check=False, timeout=60)


def rename_a_field(where: Path) -> None:
    file = where / "proto/pretrade/decision/v1/decision.proto"
    text = file.read_text()
    assert " quantity = " in text
    file.write_text(text.replace(" quantity = ", " amount = ", 1))
    git(where, "commit", "--quiet", "--all", "--message", "renamed")


def test_a_contract_that_breaks_callers_of_the_last_release_is_refused(repository: Path) -> None:
    git(repository, "tag", "v1.2.3")
    same = broken(repository)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "against v1.2.3" in same.stdout
    rename_a_field(repository)
    refused = broken(repository)
    assert refused.returncode != 0
    assert "quantity" in refused.stdout + refused.stderr


def test_without_a_release_there_is_nothing_to_break_and_that_is_said(repository: Path) -> None:
    git(repository, "tag", "nightly")
    rename_a_field(repository)
    done = broken(repository)
    assert done.returncode == 0
    assert "skipped, nothing was ever released" in done.stdout


def test_a_clone_that_may_lack_the_last_release_is_an_error(repository: Path, tmp_path: Path) -> None:
    git(repository, "tag", "v1.2.3")
    rename_a_field(repository)
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{repository}", "shallow")
    done = broken(tmp_path / "shallow")
    assert done.returncode == 1
    assert "shallow" in done.stderr


# --- The rollout


def verdict(tmp_path: Path, *answers: admin_pb2.GetCanaryResponse, code: int = 0) -> subprocess.CompletedProcess[str]:
    """What the rollout makes of answers as `pretrade` prints them, one after another, the last again and again."""
    for number, answer in enumerate(answers):
        (tmp_path / f"{number}.json").write_text(MessageToJson(answer, always_print_fields_with_no_presence=True))
    tool = tmp_path / "tool"
    tool.write_text(
        f"""#!/bin/sh
cd {tmp_path}
n=$(cat asked 2> /dev/null || echo 0); echo $((n + 1)) > asked
[ "$*" = "canary status --once --json" ] || exit 2
cat $n.json 2> /dev/null || cat {len(answers) - 1}.json
exit {code}
"""
    )
    tool.chmod(0o755)
    command: list[str | Path] = [
        ROOT / ".ci/verdict",
        "--within",
        "1",
        "--every",
        "0.01",
        "--",
        tool,
        "canary",
        "status",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def canary(state: admin_pb2.CanaryState.ValueType) -> admin_pb2.GetCanaryResponse:
    return admin_pb2.GetCanaryResponse(canary=admin_pb2.Canary(state=state, weight=0.25, verdict_reason="because"))


def test_a_rollout_waits_until_the_canary_is_promoted(tmp_path: Path) -> None:
    done = verdict(tmp_path, canary(admin_pb2.CANARY_STATE_RUNNING), canary(admin_pb2.CANARY_STATE_PROMOTED))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("CANARY_STATE_RUNNING, 25%")


@pytest.mark.parametrize(
    "state", [admin_pb2.CANARY_STATE_ROLLED_BACK, admin_pb2.CANARY_STATE_ABORTED, admin_pb2.CANARY_STATE_RUNNING]
)
def test_a_rollout_ends_with_a_canary_that_is_not_promoted(
    tmp_path: Path, state: admin_pb2.CanaryState.ValueType
) -> None:
    assert verdict(tmp_path, canary(state), code=5).returncode == 1


def test_a_rollout_without_a_canary_goes_on_and_one_without_an_answer_does_not(tmp_path: Path) -> None:
    assert verdict(tmp_path, admin_pb2.GetCanaryResponse(), code=6).returncode == 0
    silent: list[str | Path] = [ROOT / ".ci/verdict", "--within", "0", "--", "false"]
    assert subprocess.run(silent, capture_output=True, check=False).returncode == 1


def test_an_image_is_pinned_by_what_was_verified(tmp_path: Path) -> None:
    overlay = tmp_path / "kustomization.yaml"
    overlay.write_text((ROOT / "k8s/overlays/prod/kustomization.yaml").read_text())
    digest = f"sha256:{'0a' * 32}"
    for name in ("server", "worker", "torchserve"):
        pin: list[str | Path] = [
            ROOT / ".ci/pin-image",
            overlay,
            f"pretrade-{name}",
            f"ghcr.io/us/pretrade-{name}",
            digest,
        ]
        subprocess.run(pin, check=True)
    images = yaml.safe_load(overlay.read_text())["images"]
    assert {image["newName"] for image in images} == {
        f"ghcr.io/us/pretrade-{name}" for name in ("server", "worker", "torchserve")
    }
    assert all(set(image) == {"name", "newName", "digest"} and image["digest"] == digest for image in images)
    wrong: list[str | Path] = [ROOT / ".ci/pin-image", overlay, "pretrade-server", "x", "latest"]
    assert subprocess.run(wrong, capture_output=True, check=False).returncode == 1


def test_a_rollout_goes_on_only_after_the_verdict_and_back_otherwise() -> None:
    names = [step.get("run", "") for step in jobs(ROOT / ".github/workflows/rollout.yml")["roll-out"]["steps"]]
    order = [
        next(i for i, run in enumerate(names) if f".ci/roll-out {step}" in run)
        for step in ("one", "watch", "all", "back")
    ]
    assert order == sorted(order)
    watch = (ROOT / ".ci/roll-out").read_text().partition("  watch)")[2].partition(";;")[0]
    assert ".ci/verdict" in watch
    assert "firing" in watch
