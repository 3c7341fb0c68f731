"""What the Terraform files promise the rest of the repository; check-deploy checks their format and policies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import yaml

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "k8s" / "terraform"
TEXT: Final = "\n".join(path.read_text() for path in sorted(FOLDER.glob("*.tf")))


def test_every_variable_is_explained_and_used() -> None:
    declared = re.findall(r'(?m)^variable "(\w+)" \{\n((?:  .*\n)+)\}', TEXT)
    assert declared
    for name, body in declared:
        assert "description" in body, name
        assert f"var.{name}" in TEXT.replace(body, ""), name


def test_production_gives_every_variable_that_has_no_default() -> None:
    declared = re.findall(r'(?m)^variable "(\w+)" \{\n((?:  .*\n)+)\}', TEXT)
    given = set(re.findall(r"(?m)^(\w+)\s*=", (FOLDER / "production.tfvars").read_text()))
    assert {name for name, body in declared if "default" not in body} <= given <= {name for name, _ in declared}


def test_everything_that_is_referred_to_is_declared() -> None:
    declared = {f"{kind}.{name}" for kind, name in re.findall(r'(?m)^resource "(\w+)" "(\w+)"', TEXT)}
    declared |= {f"data.{kind}.{name}" for kind, name in re.findall(r'(?m)^data "(\w+)" "(\w+)"', TEXT)}
    code = re.sub(r"(?m)#.*$", "", TEXT)
    assert set(re.findall(r"\bdata\.aws_\w+\.\w+", code)) <= declared
    assert set(re.findall(r"(?<![\w.])(?:aws|random)_\w+\.\w+", code)) <= declared


def test_the_cluster_can_run_what_the_manifests_ask_for() -> None:
    """Native sidecars, the ports of the stores, a repository for every image."""
    version = re.search(r'kubernetes_version" \{(?s:.*?)default\s+= "1\.(\d+)"', TEXT)
    assert version is not None
    assert int(version[1]) >= 29
    policies = yaml.safe_load_all((ROOT / "k8s/base/network-policies.yaml").read_text())
    allowed = {
        port["port"]
        for policy in policies
        for rule in policy["spec"].get("egress", ())
        for port in rule.get("ports", ())
    }
    stores = dict(re.findall(r"(?m)^    (kafka|redis|postgres)\s+= (\d+)$", TEXT))
    assert len(stores) == 3
    assert {int(port) for port in stores.values()} <= allowed
    repositories = re.search(r'"aws_ecr_repository" "this" \{\s+for_each\s+= toset\((\[.*\])\)', TEXT)
    assert repositories is not None
    images = {path.name.removesuffix(".Dockerfile") for path in (ROOT / "k8s/docker").glob("*.Dockerfile")}
    assert set(yaml.safe_load(repositories[1])) == images


def test_it_says_that_it_was_never_applied() -> None:
    assert "never applied" in (FOLDER / "README.md").read_text()
