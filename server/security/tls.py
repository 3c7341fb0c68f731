"""The server's certificate and the authorities of its callers, as both edges use them."""

from __future__ import annotations

import datetime as dt
import ssl
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from server.security.identity import MAX_NAME
from server.security.settings import TlsSettings
from server.security.watched import Watched

_MAX_PRINCIPALS: Final = 32


@dataclass(frozen=True, slots=True)
class Material:
    """What a TLS server needs, checked."""

    key: bytes
    chain: bytes
    client_ca: bytes | None
    revoked: frozenset[tuple[bytes, int]]
    """Issuer's name in DER, and serial number."""
    revocations_until: float
    """Unix seconds at which the first of the revocation lists is out of date; infinite without."""
    expires_at: float
    """Unix seconds; that of the first of the chain to expire."""

    def __repr__(self) -> str:
        return f"Material(expires_at={self.expires_at})"  # never the key


def open_material(
    settings: TlsSettings, publish: Callable[[Material], None] = lambda material: None
) -> Watched[Material] | None:
    """The files of the settings; None without TLS.

    Args:
        settings: Name the files.
        publish: Gets what is to be in force, on the thread that looks, before it is; may raise `OSError`.

    Raises:
        OSError: A file cannot be read.
        ValueError: They are no good.
    """
    if settings.certificate is None or settings.key is None:
        return None
    optional = [path for path in (settings.client_ca, settings.client_crl) if path is not None]

    def made(*contents: bytes) -> Material:
        material = _material(*contents)
        publish(material)
        return material

    return Watched("certificates", (settings.certificate, settings.key, *optional), made)


def _material(chain: bytes, key: bytes, client_ca: bytes | None = None, client_crl: bytes | None = None) -> Material:
    """Checks that the files belong together and are valid now.

    Raises:
        ValueError: They do not, or are not.
    """
    certificates = check_pair(chain, key)
    authorities = [] if client_ca is None else certificates_in(client_ca, "client_ca")
    lists = [] if client_crl is None else list(_revocations(client_crl, authorities))
    return Material(
        key=key,
        chain=chain,
        client_ca=client_ca,
        revoked=frozenset((one.issuer.public_bytes(), revoked.serial_number) for one in lists for revoked in one),
        revocations_until=min(
            (one.next_update_utc.timestamp() for one in lists if one.next_update_utc is not None), default=float("inf")
        ),
        expires_at=min(certificate.not_valid_after_utc for certificate in certificates).timestamp(),
    )


def check_pair(chain: bytes, key: bytes) -> list[x509.Certificate]:
    """The certificates of a chain that belongs to a private key and is valid now.

    Raises:
        ValueError: It does not, or is not.
    """
    certificates = certificates_in(chain, "certificate")
    try:
        public = load_pem_private_key(key, None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("key: not a private key in PEM, or encrypted") from None  # the message may quote the file
    if _der(public) != _der(certificates[0].public_key()):
        raise ValueError("key: not that of the certificate")
    now = dt.datetime.now(dt.UTC)
    for certificate in certificates:
        if certificate.not_valid_after_utc <= now:
            raise ValueError(f"certificate: expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC")
        if certificate.not_valid_before_utc > now:
            raise ValueError(f"certificate: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC")
    return certificates


def certificates_in(pem: bytes, what: str) -> list[x509.Certificate]:
    """The certificates in a file; raises ValueError, which names `what`, where there are none."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(f"{what}: not a certificate in PEM: {error}") from error


def _der(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined,no-any-return]


def _revocations(pem: bytes, authorities: list[x509.Certificate]) -> Iterator[x509.CertificateRevocationList]:
    """The lists in a file; each must be signed by an authority of ours."""
    end = b"-----END X509 CRL-----"
    parts = pem.split(end)[:-1]
    if not parts:
        raise ValueError("client_crl: not a revocation list in PEM")
    for part in parts:
        try:
            revocations = x509.load_pem_x509_crl(part + end)
        except ValueError as error:
            raise ValueError(f"client_crl: not a revocation list in PEM: {error}") from error
        issuers = [one for one in authorities if one.subject == revocations.issuer]
        if not any(_is_signed(revocations, issuer) for issuer in issuers):
            raise ValueError("client_crl: not signed by an authority of client_ca")
        yield revocations


def _is_signed(revocations: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    try:
        return revocations.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # any key; raises for others
    except (TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False


def grpc_credentials(material: Watched[Material], client_certificates: bool) -> grpc.ServerCredentials:
    """Credentials of a grpc.aio port: each new connection gets the material in force.

    Args:
        material: Watched elsewhere.
        client_certificates: True to require one of every caller; else none is asked for.
    """

    def configuration() -> grpc.ServerCertificateConfiguration:
        now = material.value
        return grpc.ssl_server_certificate_configuration(
            [(now.key, now.chain)], now.client_ca if client_certificates else None
        )

    told = material.version

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal told
        if material.version == told:
            return None
        told = material.version
        return configuration()

    # None is fine with it, though its stubs say otherwise.
    return grpc.dynamic_ssl_server_credentials(configuration(), changed, client_certificates)  # type: ignore[arg-type]


def ssl_context(material: Watched[Material], client_certificates: bool) -> ssl.SSLContext:
    """TLS of a port that is not gRPC's: each new connection gets the material in force.

    Args:
        material: Watched elsewhere.
        client_certificates: True to take a caller's certificate, if it has one, and to verify it.
    """
    made = material.version, _context_of(material.value, client_certificates)

    def renewed(connection: ssl.SSLObject, _name: str, _context: ssl.SSLContext) -> None:
        nonlocal made
        if material.version != made[0]:
            made = material.version, _context_of(material.value, client_certificates)
        connection.context = made[1]

    context = _context_of(material.value, client_certificates)
    context.sni_callback = renewed  # called for every handshake, with or without a name
    return context


def _context_of(material: Material, client_certificates: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.NamedTemporaryFile() as file:  # for our user alone; the library takes files only
        file.write(material.chain + b"\n" + material.key)
        file.flush()
        context.load_cert_chain(file.name)
    if client_certificates and material.client_ca is not None:
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=material.client_ca.decode())
    return context


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A caller's certificate, which the transport has verified, as far as we go by it."""

    principals: tuple[str, ...]
    """`uri:…`, `dns:…` and `cn:…`, in this order."""
    name: str
    """The first of them, for the audit; empty when it is too long or not printable."""
    issuer: bytes
    serial: int
    expires_at: float

    @classmethod
    def parse(cls, pem: bytes) -> ClientCertificate:
        """Raises ValueError where there is none."""
        certificate = x509.load_pem_x509_certificate(pem)
        principals: list[str] = []
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            principals += [f"uri:{name}" for name in names.get_values_for_type(x509.UniformResourceIdentifier)]
            principals += [f"dns:{name}" for name in names.get_values_for_type(x509.DNSName)]
        except x509.ExtensionNotFound:
            pass
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        principals += [f"cn:{attribute.value!s}" for attribute in common]
        name = principals[0].partition(":")[2] if principals else ""
        return cls(
            tuple(principals[:_MAX_PRINCIPALS]),
            name if len(name) <= MAX_NAME and name.isprintable() else "",
            certificate.issuer.public_bytes(),
            certificate.serial_number,
            certificate.not_valid_after_utc.timestamp(),
        )
