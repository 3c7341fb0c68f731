"""Every method has its role."""

from __future__ import annotations

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2
from pretrade.decision.v1 import decision_pb2
from server.security import methods
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
