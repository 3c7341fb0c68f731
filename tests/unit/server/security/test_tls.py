"""What makes a certificate good, and what a client's certificate says."""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path

import pytest
from support.authority import RevokingAuthority

from server.security.private import write_private
from server.security.security import Security
from server.security.settings import AccessSettings, TlsSettings, TokenSettings
from server.security.tls import ClientCertificate, open_material
from server.security.trial import KeyPair


@pytest.fixture(scope="module")
def authority() -> RevokingAuthority:
    return RevokingAuthority()


@pytest.fixture
def settings(tmp_path: Path, authority: RevokingAuthority) -> TlsSettings:
    files = {"certificate": "server.pem", "key": "server.key", "client_ca": "ca.pem", "client_crl": "crl.pem"}
    install(tmp_path, authority.certify("server", dns=["localhost"]))
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "crl.pem").write_bytes(authority.revoking(()))
    return TlsSettings.model_validate({name: tmp_path / file for name, file in files.items()})


def install(directory: Path, pair: KeyPair) -> None:
    (directory / "server.pem").write_bytes(pair.certificate)
    write_private(directory / "server.key", pair.key.decode())


def test_the_key_is_never_shown(settings: TlsSettings) -> None:
    material = open_material(settings)
    assert material is not None
    assert "KEY" not in repr(material.value)
    assert b"PRIVATE" in material.value.key


@pytest.mark.parametrize(
    ("file", "contents", "problem"),
    [
        ("server.pem", "", "certificate: not a certificate"),
        ("server.key", "", "key: not a private key"),
        ("server.key", "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n", "key: not a private key"),
        ("ca.pem", "x", "client_ca: not a certificate"),
        ("crl.pem", "x", "client_crl: not a revocation list"),
    ],
)
def test_files_that_are_no_good_refuse_to_start(
    tmp_path: Path, settings: TlsSettings, file: str, contents: str, problem: str
) -> None:
    write_private(tmp_path / file, contents)
    with pytest.raises(ValueError, match=problem) as error:
        open_material(settings)
    assert "c2VjcmV0" not in str(error.value)


def test_a_certificate_is_good_in_its_time_and_with_its_key(
    tmp_path: Path, settings: TlsSettings, authority: RevokingAuthority
) -> None:
    install(tmp_path, authority.certify("server", lifetime=-dt.timedelta(days=2)))
    with pytest.raises(ValueError, match="expired at"):
        open_material(settings)
    install(tmp_path, authority.certify("server"))
    write_private(tmp_path / "server.key", authority.certify("server").key.decode())
    with pytest.raises(ValueError, match="not that of the certificate"):
        open_material(settings)


def test_several_lists_revoke_what_each_authority_says(
    tmp_path: Path, settings: TlsSettings, authority: RevokingAuthority
) -> None:
    other, stranger = RevokingAuthority("other"), RevokingAuthority("stranger")
    gone = [authority.certify("a"), authority.certify("b")]
    (tmp_path / "ca.pem").write_bytes(authority.pem + other.pem)
    (tmp_path / "crl.pem").write_bytes(authority.revoking(gone) + other.revoking([other.certify("c")]))
    material = open_material(settings)
    assert material is not None
    assert len(material.value.revoked) == 3
    parsed = ClientCertificate.parse(gone[0].certificate)
    assert (parsed.issuer, parsed.serial) in material.value.revoked
    (tmp_path / "crl.pem").write_bytes(stranger.revoking(()))
    assert not material.look()
    assert "not signed" in material.problem
    assert len(material.value.revoked) == 3


def test_names_are_principals_in_their_order(authority: RevokingAuthority) -> None:
    pair = authority.certify("common", dns=["a.example", "b.example"], uris=["spiffe://x/y"], ips=["10.0.0.1"])
    parsed = ClientCertificate.parse(pair.certificate)
    assert parsed.principals == ("uri:spiffe://x/y", "dns:a.example", "dns:b.example", "cn:common")
    assert parsed.name == "spiffe://x/y"
    assert ClientCertificate.parse(authority.certify("just a name").certificate).name == "just a name"
    assert ClientCertificate.parse(authority.certify("a", uris=["spiffe://" + "x" * 300]).certificate).name == ""


async def test_what_is_about_to_expire_is_unhealthy(settings: TlsSettings, authority: RevokingAuthority) -> None:
    async def record(entry: bytes) -> None:
        return None

    def problem(after_days: float, **changes: float) -> str:
        tls = settings.model_copy(update=changes)
        security = Security(
            tls,
            TokenSettings(),
            AccessSettings(),
            None,
            record,
            "test",
            time.monotonic,
            wall_clock=lambda: time.time() + after_days * 86_400,
        )
        return security.components()["certificates"].problem()

    assert problem(0.0, warn_days=0.5) == ""
    assert "expires in 1.0 days" in problem(0.0, warn_days=2.0)
    assert problem(1.1, warn_days=0.0) == "has expired"
    assert "out of date" in problem(1.1, warn_days=-5.0)


@pytest.mark.parametrize(
    ("file", "section"),
    [("policy.json", {"access": {"policy": True}}), ("jwks.json", {"tokens": {"jwks": True, "issuer": "us"}})],
)
@pytest.mark.parametrize("contents", [None, "{", '{"roles": 7}'])
def test_files_that_are_no_good_keep_a_server_from_starting(
    tmp_path: Path, file: str, section: dict[str, dict[str, object]], contents: str | None
) -> None:
    async def record(entry: bytes) -> None:
        return None

    path = tmp_path / file
    if contents is not None:
        path.write_text(contents)
    named = {
        name: {field: str(path) if value is True else value for field, value in values.items()}
        for name, values in section.items()
    }
    tokens = TokenSettings.model_validate(named.get("tokens", {}))
    access = AccessSettings.model_validate(named.get("access", {}))
    with pytest.raises(OSError, match=r"No such file|credentials: "):
        Security(TlsSettings(), tokens, access, None, record, "test", time.monotonic)
