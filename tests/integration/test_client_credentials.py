"""The Python client library over TLS, with the token and the certificate of its caller, in every way of asking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support.askers import CALLS, ORDER, STREAM, WAYS, asking
from support.authority import RevokingAuthority
from support.secure_server import SecureServer

from pretrade.client import PermissionDeniedError, UnauthenticatedError, UnavailableError
from pretrade.client.credential_variables import CA, CERTIFICATE, KEY, TOKEN_FILE
from server.security.private import write_private
from server.security.trial import KeyPair

pytestmark = pytest.mark.stack
ONCE: Final[dict[str, Any]] = {"idempotency_keys": False}
"""Of clients that cannot connect: a call is not made again until its deadline."""


@pytest.fixture(scope="module")
def wants_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    server = SecureServer(tmp_path_factory.mktemp("token"), "token")
    with server.running():
        yield server


@pytest.fixture(scope="module")
def wants_certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    server = SecureServer(tmp_path_factory.mktemp("certificate"), "certificate")
    with server.running():
        yield server


def shown(directory: Path, pair: KeyPair) -> dict[str, Path]:
    """The arguments of `connect` that show a certificate."""
    certificate, key = directory / "caller.pem", directory / "caller.key"
    write_private(certificate, pair.certificate.decode())
    write_private(key, pair.key.decode())
    return {"certificate": certificate, "key": key}


def ca_of(server: SecureServer) -> Path:
    return server.path("ca.pem")


@pytest.mark.parametrize("way", WAYS)
def test_a_token_is_shown_over_tls(wants_token: SecureServer, way: str) -> None:
    with asking(way, wants_token.decision, ca=ca_of(wants_token), token=wants_token.token("trader")) as ask:
        assert ask(ORDER).action == "ABSTAIN"
    with asking(way, wants_token.decision, ca=ca_of(wants_token)) as ask:
        with pytest.raises(UnauthenticatedError) as refused:
            ask(ORDER)
        assert refused.value.reason == "NO_TOKEN"
    viewer = wants_token.token("viewer")
    with (
        asking(way, wants_token.decision, ca=ca_of(wants_token), token=viewer) as ask,
        pytest.raises(PermissionDeniedError),
    ):
        ask(ORDER)


@pytest.mark.parametrize("way", WAYS)
def test_a_tokens_file_may_be_replaced_while_the_client_is_connected(
    wants_token: SecureServer, tmp_path: Path, way: str
) -> None:
    file = tmp_path / "token"
    write_private(file, wants_token.token("trader"))
    with asking(way, wants_token.decision, ca=ca_of(wants_token), token_file=file) as ask:
        assert ask(ORDER).action == "ABSTAIN"
        write_private(file, "not one")
        if way == STREAM:  # it showed its token when it opened
            assert ask(ORDER).action == "ABSTAIN"
            return
        with pytest.raises(UnauthenticatedError):
            ask(ORDER)
        write_private(file, wants_token.token("trader"))
        assert ask(ORDER).action == "ABSTAIN"


@pytest.mark.parametrize("way", WAYS)
def test_a_certificate_is_shown_over_tls(wants_certificate: SecureServer, tmp_path: Path, way: str) -> None:
    server, ca = wants_certificate, ca_of(wants_certificate)
    trader = shown(tmp_path, server.authority.certify("trader"))
    with asking(way, server.decision, ca=ca, **trader) as ask:
        assert ask(ORDER).action == "ABSTAIN"
    with asking(way, server.decision, ca=ca, **ONCE) as ask, pytest.raises(UnavailableError):
        ask(ORDER)
    viewer = shown(tmp_path, server.authority.certify("viewer"))
    with asking(way, server.decision, ca=ca, **viewer) as ask, pytest.raises(PermissionDeniedError):
        ask(ORDER)


@pytest.mark.parametrize("way", CALLS)
def test_a_certificate_of_another_authority_is_refused_on_both_sides(
    wants_certificate: SecureServer, tmp_path: Path, way: str
) -> None:
    server, stranger = wants_certificate, RevokingAuthority()
    theirs = shown(tmp_path, stranger.certify("trader"))
    with asking(way, server.decision, ca=ca_of(server), **theirs, **ONCE) as ask, pytest.raises(UnavailableError):
        ask(ORDER)
    ours, authority = shown(tmp_path, server.authority.certify("trader")), tmp_path / "ca.pem"
    write_private(authority, stranger.pem.decode())
    with asking(way, server.decision, ca=authority, **ours, **ONCE) as ask, pytest.raises(UnavailableError):
        ask(ORDER)


@pytest.mark.parametrize("way", CALLS)
def test_the_name_in_the_servers_certificate_is_checked_and_may_be_named(wants_token: SecureServer, way: str) -> None:
    known = {"ca": ca_of(wants_token), "token": wants_token.token("trader")}
    with asking(way, wants_token.decision, tls_name="localhost", **known) as ask:
        assert ask(ORDER).action == "ABSTAIN"
    with (
        asking(way, wants_token.decision, tls_name="elsewhere", **known, **ONCE) as ask,
        pytest.raises(UnavailableError),
    ):
        ask(ORDER)


@pytest.mark.parametrize("way", CALLS)
def test_what_connect_does_not_say_is_what_the_environment_names(
    wants_token: SecureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    file = tmp_path / "token"
    write_private(file, wants_token.token("trader"))
    caller = shown(tmp_path, wants_token.authority.certify("trader"))
    named = {CA: ca_of(wants_token), TOKEN_FILE: file, CERTIFICATE: caller["certificate"], KEY: caller["key"]}
    for name, path in named.items():
        monkeypatch.setenv(name, str(path))
    with asking(way, wants_token.decision) as ask:
        assert ask(ORDER).action == "ABSTAIN"
