"""A port that would be open to everybody, or closed to all, refuses to start."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from pretrade.client import operator_token
from server.settings import Settings

_TLS = {"certificate": "/c.pem", "key": "/k.pem"}
_TOKENS = {"jwks": "/jwks.json", "issuer": "us"}
_ROLES = {"claim:on-call": "operator"}


def settings(**sections: object) -> Settings:
    return Settings.model_validate(sections)


def test_the_default_is_loopback_and_a_token_of_the_servers_own_for_administration() -> None:
    assert settings().access.admin == "operator_token"
    assert settings().admin.host == settings().grpc.host == "127.0.0.1"
    assert settings().access.decision == "open"


def test_an_open_decision_port_is_open_to_a_network_by_name_alone() -> None:
    found = settings(grpc={"host": "0.0.0.0"}, access={"decision_open_to_network": True})
    assert found.access.decision == "open"
    with pytest.raises(ValidationError, match=r"grpc\.host.*decision_open_to_network"):
        settings(grpc={"host": "0.0.0.0"})


def test_the_command_looks_where_a_server_keeps_its_operator_token() -> None:
    assert operator_token.path_from({}) == operator_token.token_path(settings().journal.path)
    assert operator_token.path_from({"PRETRADE_JOURNAL__PATH": "/var/j.db"}) == Path("/var/j.db.operator-token")


def test_with_credentials_the_admin_plane_may_listen_anywhere() -> None:
    access = {"admin": "token", "roles": _ROLES}
    found = settings(admin={"host": "0.0.0.0"}, tls=_TLS, tokens=_TOKENS, access=access)
    assert found.admin.host == "0.0.0.0"
    certificates = settings(
        admin={"host": "::"}, tls=_TLS | {"client_ca": "/ca.pem"}, access={"admin": "certificate", "roles": _ROLES}
    )
    assert certificates.access.admin == "certificate"


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"admin": {"host": "0.0.0.0"}}, "loopback only"),
        ({"access": {"admin": "open"}}, "operator_token"),
        ({"grpc": {"host": "10.1.2.3"}}, "loopback only"),
        ({"grpc": {"host": "::"}, "tls": _TLS}, "loopback only"),
        ({"grpc": {"host": "pretrade.example"}}, "loopback only"),
        ({"access": {"strategies": {"sub:a": "*"}}}, "callers are not identified"),
        ({"admin": {"host": "0.0.0.0"}, "tls": _TLS}, "loopback only"),
        (
            {"admin": {"host": "10.0.0.1"}, "tokens": _TOKENS, "access": {"admin": "token", "roles": _ROLES}},
            "over TLS only",
        ),
        (
            {"grpc": {"host": "0.0.0.0"}, "tokens": _TOKENS, "access": {"decision": "token", "roles": _ROLES}},
            "over TLS only",
        ),
        ({"access": {"admin": "token", "roles": _ROLES}}, "needs tokens.jwks"),
        ({"access": {"admin": "certificate", "roles": _ROLES}, "tls": _TLS}, "needs tls.client_ca"),
        ({"access": {"admin": "token"}, "tokens": _TOKENS}, "no caller has a role"),
        ({"access": {"decisions_per_second": 5}}, "callers are not identified"),
        ({"access": {"roles": {"claim:x": "root"}}}, "roles"),
        ({"access": {"roles": {"x": "admin"}}}, "roles"),
        ({"access": {"admin": "password"}}, "admin"),
        ({"tls": {"certificate": "/c.pem"}}, "belong together"),
        ({"tls": {"client_ca": "/ca.pem"}}, "client_ca needs certificate"),
        ({"tls": _TLS | {"client_crl": "/crl.pem"}}, "client_crl needs client_ca"),
        ({"tokens": {"jwks": "/jwks.json"}}, "jwks needs issuer"),
        ({"tokens": _TOKENS | {"jwks": "http://issuer.example/jwks"}}, "https"),
        ({"tokens": _TOKENS | {"jwks": "file:///etc/jwks"}}, "https"),
        ({"tokens": _TOKENS | {"algorithms": ["HS256"]}}, "algorithms"),
        ({"tokens": _TOKENS | {"algorithms": ["none"]}}, "algorithms"),
        ({"tokens": _TOKENS | {"algorithms": []}}, "algorithms"),
    ],
)
def test_settings_that_do_not_fit_together_refuse_to_start(sections: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        settings(**sections)
