"""Every method has its role."""

from __future__ import annotations

import pytest

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2
from pretrade.decision.v1 import decision_pb2
from server.security import methods
from server.security.access import peer_host
from server.security.identity import Role


def test_somebody_has_thought_about_every_method() -> None:
    """A method that is new here asks for `admin` until it stands in the table."""
    files = (admin_pb2, audit_pb2, decision_pb2)
    served = {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    ours = {method for method in methods.ROLES if method.startswith("/pretrade.")}
    assert served == ours


def test_a_method_nobody_knows_asks_for_admin() -> None:
    assert methods.roles("/pretrade.admin.v1.AdminService/FormatDisk") == {Role.ADMIN}


def test_processes_of_one_server_may_only_look() -> None:
    assert all(Role.VIEWER in methods.roles(method) for method in methods.OF_SIBLINGS)


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:127.0.0.1:44634", "127.0.0.1"),
        ("ipv6:%5B::1%5D:35848", "::1"),
        ("ipv6:[fe80::1]:1", "fe80::1"),
        ("unix:", "unix:"),
        ("", "unknown"),
        ("unixoid", "unixoid"),
    ],
)
def test_a_peer_is_known_by_its_host(peer: str, host: str) -> None:
    assert peer_host(peer) == host
