"""Certificates and tokens for trials on one machine, and for tests. A user who can read the files may do everything."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server.security.identity import Role
from server.security.private import write_private

ISSUER: Final = "pretrade trial"
AUDIENCE: Final = "pretrade"
_DAY: Final = dt.timedelta(days=1)
_BACKDATED: Final = dt.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its private key, in PEM."""

    certificate: bytes
    key: bytes

    @property
    def serial(self) -> int:
        """The certificate's."""
        return x509.load_pem_x509_certificate(self.certificate).serial_number


class TrialAuthority:
    """A certificate authority that forgets its key when the process ends."""

    def __init__(self, name: str = ISSUER) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _subject(name)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = _builder(self._name, self._name, self._key.public_key(), 30 * _DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self._certificate = builder.add_extension(usage, critical=True).sign(self._key, hashes.SHA256())
        self.pem = self._certificate.public_bytes(Encoding.PEM)

    def certify(
        self,
        common_name: str,
        *,
        dns: Iterable[str] = (),
        ips: Iterable[str] = (),
        uris: Iterable[str] = (),
        lifetime: dt.timedelta = _DAY,
    ) -> KeyPair:
        """A certificate for a server or a client; one with a negative lifetime has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            *map(x509.DNSName, dns),
            *(x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips),
            *map(x509.UniformResourceIdentifier, uris),
        ]
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = _builder(_subject(common_name), self._name, key.public_key(), lifetime)
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return KeyPair(certificate.public_bytes(Encoding.PEM), _private(key))


class TrialIssuer:
    """Issues tokens.

    Args:
        kid: Its key's name.
        algorithm: `ES256` or `RS256`.
    """

    def __init__(self, kid: str = "trial-1", algorithm: str = "ES256") -> None:
        self.kid = kid
        self.algorithm = algorithm
        self.key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
        if algorithm == "ES256":
            self.key = ec.generate_private_key(ec.SECP256R1())
        else:
            self.key = rsa.generate_private_key(65_537, 2_048)

    def jwk(self) -> dict[str, Any]:
        """Its public key."""
        of = jwt.get_algorithm_by_name(self.algorithm)
        return {**of.to_jwk(self.key.public_key(), as_dict=True), "kid": self.kid, "use": "sig", "alg": self.algorithm}

    def token(self, subject: str, roles: Sequence[str] = (), **changes: Any) -> str:
        """A token that is good for an hour; a claim that is changed to None is left out."""
        now = time.time()
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject,
            "roles": list(roles),
            "iat": int(now),
            "exp": int(now) + 3_600,
            "jti": str(uuid.uuid4()),
        } | changes
        kept = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(kept, self.key, self.algorithm, {"kid": self.kid})


def jwks(issuers: Iterable[TrialIssuer]) -> str:
    """The public keys of issuers."""
    return json.dumps({"keys": [issuer.jwk() for issuer in issuers]})


def write(directory: Path, hosts: Sequence[str]) -> list[Path]:
    """Writes all that a server and its callers on this machine need to try TLS, tokens and client certificates.

    Raises:
        OSError: They cannot be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority, issuer = TrialAuthority(), TrialIssuer()
    addresses = [host for host in hosts if _is_address(host)]
    server = authority.certify("pretrade", dns=[host for host in hosts if host not in addresses], ips=addresses)
    files = {"ca.pem": authority.pem.decode(), "jwks.json": jwks((issuer,))}
    files |= {"server.pem": server.certificate.decode(), "server.key": server.key.decode()}
    for role in Role:
        pair = authority.certify(f"trial-{role}")
        files |= {f"{role}.pem": pair.certificate.decode(), f"{role}.key": pair.key.decode()}
        files[f"{role}.token"] = issuer.token(f"trial-{role}", [role], exp=int(time.time()) + 86_400)
    roles = {f"{kind}:{name}{role}": role for role in Role for kind, name in (("claim", ""), ("cn", "trial-"))}
    settings = {
        "PRETRADE_TLS__CERTIFICATE": directory / "server.pem",
        "PRETRADE_TLS__KEY": directory / "server.key",
        "PRETRADE_TLS__CLIENT_CA": directory / "ca.pem",
        "PRETRADE_TOKENS__JWKS": directory / "jwks.json",
        "PRETRADE_TOKENS__ISSUER": f"'{ISSUER}'",
        "PRETRADE_ACCESS__ADMIN": "token",
        "PRETRADE_ACCESS__ROLES": f"'{json.dumps(roles)}'",
        "PRETRADE_CLIENT_CA": directory / "ca.pem",
        "PRETRADE_CLIENT_TOKEN_FILE": directory / "operator.token",
    }
    files["trial.env"] = "".join(f"export {name}={value}\n" for name, value in settings.items())
    for name, text in files.items():
        write_private(directory / name, text)
    return [directory / name for name in files]


def _builder(subject: x509.Name, issuer: x509.Name, key: Any, lifetime: dt.timedelta) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    begins = min(now, now + lifetime) - _BACKDATED
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(begins)
    return builder.not_valid_after(now + lifetime)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
