"""F4: a file that is no good leaves the last value in force, whole; a good one replaces it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.security.identity import Policy, Role
from server.security.watched import Watched


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policy.json"
    path.write_text('{"roles": {"sub:alice": "operator"}}')
    return path


@pytest.fixture
def policy(path: Path) -> Watched[Policy]:
    return Watched("policy", (path,), lambda text: Policy({"sub:root": Role.ADMIN}).with_file(text))


def roles(policy: Watched[Policy], name: str) -> set[Role] | None:
    grants = policy.value.grants((f"sub:{name}",))
    return None if grants is None else set(grants.roles)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"roles": {"sub:alice": "vie',
        "[]",
        "null",
        "\x00",
        '{"rules": {}}',
        '{"roles": ["sub:alice"]}',
        '{"roles": {"sub:alice": "king"}}',
        '{"roles": {"sub:alice": 7}}',
        '{"roles": {}, "denied": "sub:alice"}',
        '{"roles": {}, "denied": [1]}',
        '{"denied": ["alice"]}',
        '{"strategies": {"alice": "twap-*"}}',
        '{"strategies": {"sub:alice": ""}}',
        '{"strategies": ["twap-*"]}',
        '{"rates": {"role:trader": 5}}',
        '{"rates": {"role:trader": {"decisions_per_second": 0}}}',
        '{"rates": {"sub:alice": {"orders": 1}}}',
    ],
)
def test_a_file_that_is_no_good_changes_nothing(path: Path, policy: Watched[Policy], text: str) -> None:
    path.write_text(text)
    assert not policy.look()
    assert roles(policy, "alice") == {Role.OPERATOR, Role.VIEWER}
    assert (policy.version, policy.failures) == (1, 1)
    assert policy.problem
    assert not policy.look()
    assert policy.failures == 1, "one problem, however often it is met"
    path.write_text('{"roles": {"sub:alice": "viewer"}}')
    assert policy.look()
    assert roles(policy, "alice") == {Role.VIEWER}
    assert (policy.version, policy.problem) == (2, "")


def test_bytes_that_are_no_text_change_nothing(path: Path, policy: Watched[Policy]) -> None:
    path.write_bytes(b"\xff\xfe{}")
    assert not policy.look()
    assert roles(policy, "alice")


def test_a_file_that_is_gone_or_huge_changes_nothing(path: Path, policy: Watched[Policy]) -> None:
    path.unlink()
    assert not policy.look()
    assert policy.problem
    path.mkdir()
    assert not policy.look()
    path.rmdir()
    path.write_bytes(b" " * 2_000_000)
    assert not policy.look()
    assert "larger" in policy.problem
    assert roles(policy, "alice")
    path.write_text('{"roles": {"sub:alice": "operator"}}')
    assert not policy.look(), "as it was"
    assert policy.problem == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_changes_nothing(path: Path, policy: Watched[Policy]) -> None:
    path.chmod(0)
    assert not policy.look()
    assert "Permission" in policy.problem
    assert roles(policy, "alice")


def test_a_symlink_that_is_swapped_is_a_replacement(tmp_path: Path) -> None:
    """As Kubernetes replaces the files of a secret."""
    for number, role in enumerate(("viewer", "admin")):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "policy.json").write_text(f'{{"roles": {{"sub:alice": "{role}"}}}}')
    data, new = tmp_path / "..data", tmp_path / "..new"
    data.symlink_to("0")
    (tmp_path / "policy.json").symlink_to("..data/policy.json")
    policy = Watched("policy", (tmp_path / "policy.json",), lambda text: Policy().with_file(text))
    assert roles(policy, "alice") == {Role.VIEWER}
    new.symlink_to("1")
    new.replace(data)
    assert policy.look()
    assert roles(policy, "alice") == set(Role)


def test_the_settings_roles_stay_and_the_denied_are_nobody(path: Path, policy: Watched[Policy]) -> None:
    path.write_text('{"roles": {"sub:bob": ["trader", "viewer"]}, "denied": ["claim:leaver"]}')
    assert policy.look()
    assert roles(policy, "root") == set(Role)
    assert roles(policy, "bob") == {Role.TRADER, Role.VIEWER}
    assert roles(policy, "alice") == set()
    assert policy.value.grants(("sub:bob", "claim:leaver")) is None
    assert roles(policy, "eve") == set()
