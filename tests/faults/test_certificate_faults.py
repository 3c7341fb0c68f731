"""F5: certificates that are replaced, expired, revoked, somebody else's, or missing."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import quote

import grpc
import httpx
import pytest
from cryptography import x509
from support.authority import RevokingAuthority
from support.harness import PATIENCE_SECONDS, eventually
from support.secure_server import SecureServer, decide, halt, refused, status
from support.server_group import RARELY_ON_ENVOY
from websockets import InvalidStatus
from websockets.asyncio.client import connect

from local.stack.ports import free_ports
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.security.private import write_private
from server.security.trial import KeyPair, TrialAuthority

pytestmark = pytest.mark.stack
_CODES = grpc.StatusCode
_SOON = dt.timedelta(days=3)


@pytest.fixture(scope="module", params=RARELY_ON_ENVOY)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    server = SecureServer(tmp_path_factory.mktemp(f"certificates-{request.param}"), "certificate")
    (http,) = free_ports(1)
    with server.running(GRPC__EDGE=request.param, HTTP__PORT=str(http)):
        yield server


def pair(server: SecureServer, lifetime: dt.timedelta = _SOON) -> KeyPair:
    return server.authority.certify("pretrade", dns=["localhost"], ips=["127.0.0.1"], lifetime=lifetime)


def client_context(server: SecureServer) -> ssl.SSLContext:
    """A client with a certificate that is good, and nobody's in particular."""
    context = ssl.create_default_context(cadata=server.authority.pem.decode())
    probe = server.authority.certify("probe")
    certificate, key = server.path("probe.pem"), server.path("probe.key")
    certificate.write_bytes(probe.certificate)
    write_private(key, probe.key.decode())
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    return context


def served_serial(server: SecureServer, address: str) -> int:
    """Serial number of the certificate that a new connection is shown."""
    context = client_context(server)
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        der = tls.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der).serial_number


@pytest.mark.fault(
    "F5",
    "The server certificate is replaced five times under load",
    "New connections get the new certificate. No call fails.",
)
def test_a_certificate_is_replaced_under_load(server: SecureServer, seen: Callable[[str], None]) -> None:
    trader = server.authority.certify("trader")
    errors: list[str] = []
    decided = [0, 0]
    stopped = threading.Event()

    def on_one_connection() -> None:
        with server.channel(server.decision, pair=trader) as channel:
            while not stopped.is_set():
                try:
                    decide(channel)
                    decided[0] += 1
                except grpc.RpcError as error:
                    errors.append(f"{error.code()}: {error.details()}")

    def on_new_connections() -> None:
        while not stopped.is_set():
            with server.channel(server.decision, pair=trader) as channel:
                try:
                    decide(channel)
                    decided[1] += 1
                except grpc.RpcError as error:
                    errors.append(f"{error.code()}: {error.details()}")

    threads = [threading.Thread(target=target) for target in (on_one_connection, on_new_connections)]
    for thread in threads:
        thread.start()
    took = []
    try:
        for _ in range(5):
            new = pair(server)
            before = sum(decided)
            started = time.monotonic()
            server.install(new)
            eventually(lambda: served_serial(server, server.decision), lambda serial, new=new: serial == new.serial)  # type: ignore[misc]
            took.append(time.monotonic() - started)
            eventually(lambda: served_serial(server, server.admin), lambda serial, new=new: serial == new.serial)  # type: ignore[misc]
            eventually(lambda: sum(decided), lambda count, before=before: count > before + 10)  # type: ignore[misc]
    finally:
        stopped.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
    assert errors == []
    assert min(decided) > 0
    seen(
        f"{decided[0]} calls on one connection, {decided[1]} on as many, none failed; in force after {max(took):.2f} s"
    )


@pytest.mark.long
@pytest.mark.fault(
    "F5",
    "A new certificate is expired, half written, missing, or does not fit its key",
    "The last good one stays in use. The failure is counted and logged, and the component is unhealthy.",
)
def test_a_certificate_that_is_no_good_is_not_taken(server: SecureServer, seen: Callable[[str], None]) -> None:
    sound = pair(server)
    server.install(sound)
    eventually(lambda: served_serial(server, server.decision), lambda serial: serial == sound.serial)
    operator = server.authority.certify("operator")
    expired, other = pair(server, lifetime=-_SOON), pair(server)
    bad = {
        "expired": (expired.certificate, expired.key),
        "of another key": (other.certificate, sound.key),
        "half written": (other.certificate[:300], other.key),
        "no key": (sound.certificate, b"-----BEGIN PRIVATE KEY-----\nhello\n-----END PRIVATE KEY-----\n"),
        "empty": (b"", b""),
    }

    def problem(channel: grpc.Channel) -> str:
        return next((part.detail for part in status(channel).components if part.name == "certificates"), "")

    with server.channel(server.admin, pair=operator) as channel:
        assert problem(channel) == ""
        for what, (certificate, key) in bad.items():
            failures = server.metric("pretrade_credentials_failures_total", file="certificates")
            version = server.metric("pretrade_credentials_version", file="certificates")
            write_private(server.path("server.pem"), certificate.decode())
            write_private(server.path("server.key"), key.decode())
            eventually(
                lambda: server.metric("pretrade_credentials_failures_total", file="certificates"),
                lambda count, failures=failures: count > failures,  # type: ignore[misc]
            )
            assert served_serial(server, server.decision) == sound.serial, what
            assert served_serial(server, server.admin) == sound.serial, what
            assert server.metric("pretrade_credentials_version", file="certificates") == version
            assert eventually(lambda: problem(channel), bool), what
        server.install(sound)
        eventually(lambda: problem(channel), lambda found: found == "")
    log = server.log()
    assert "not replaced, the last one stays in force" in log
    assert not any(key.decode().splitlines()[1] in log for _, key in bad.values() if len(key) > 100)
    seen(f"{len(bad)} of {len(bad)} left the last one in force, on both ports")


@pytest.mark.fault(
    "F5",
    "A client has no certificate, an expired one, or one of another authority",
    "The connection is refused. No call reaches the server, so the audit has no row.",
)
def test_a_client_that_nobody_vouches_for_does_not_get_in(server: SecureServer, seen: Callable[[str], None]) -> None:
    stranger = TrialAuthority("somebody else")
    clients = {
        "none": None,
        "of another authority": stranger.certify("operator"),
        "expired": server.authority.certify("operator", lifetime=-_SOON),
    }
    for what, client in clients.items():
        for address in (server.decision, server.admin):
            with server.channel(address, pair=client) as channel:
                assert refused(decide if address == server.decision else halt, channel) is _CODES.UNAVAILABLE, what
    trader = server.authority.certify("trader")
    with server.channel(server.decision, pair=trader, ca=stranger.pem) as channel:
        assert refused(decide, channel) is _CODES.UNAVAILABLE, "the caller does not believe the server"
    with grpc.insecure_channel(server.decision) as channel:
        assert refused(decide, channel) is _CODES.UNAVAILABLE, "in the open"
    with server.channel(server.decision, pair=trader) as channel:
        decide(channel)
    seen("3 kinds of clients on 2 ports: UNAVAILABLE in the handshake")


@pytest.mark.fault(
    "F5",
    "A client certificate is revoked",
    "UNAUTHENTICATED at once, on open connections too. Other clients are not affected.",
)
def test_a_revoked_client_does_not_get_in(server: SecureServer, seen: Callable[[str], None]) -> None:
    stolen, other = server.authority.certify("operator"), server.authority.certify("operator")
    with contextlib.ExitStack() as stack:
        connected = stack.enter_context(server.channel(server.admin, pair=stolen))
        halt(connected)
        started = time.monotonic()
        write_private(server.path("crl.pem"), server.authority.revoking([stolen]).decode())

        def refused_now() -> grpc.StatusCode:
            try:
                status(connected)
            except grpc.RpcError as error:
                found: grpc.StatusCode = error.code()
                return found
            return _CODES.OK

        eventually(refused_now, lambda code: code is _CODES.UNAUTHENTICATED)
        took = time.monotonic() - started
        anew = stack.enter_context(server.channel(server.admin, pair=stolen))
        assert refused(status, anew) is _CODES.UNAUTHENTICATED
        decides = stack.enter_context(server.channel(server.decision, pair=stolen))
        assert refused(decide, decides) is _CODES.UNAUTHENTICATED
        halt(stack.enter_context(server.channel(server.admin, pair=other)))
    entries = eventually(server.refusals, lambda found: any(one.reason == "CERTIFICATE_REVOKED" for one in found))
    assert {one.peer for one in entries} == {"127.0.0.1"}
    seen(f"refused on the open connection after {took:.2f} s")


@pytest.mark.fault("F5", "The revocation list comes from another authority", "The last good list stays in use.")
def test_a_revocation_list_of_somebody_else_is_not_taken(server: SecureServer) -> None:
    failures = server.metric("pretrade_credentials_failures_total", file="certificates")
    write_private(server.path("crl.pem"), RevokingAuthority("pretrade trial").revoking(()).decode())
    eventually(
        lambda: server.metric("pretrade_credentials_failures_total", file="certificates"),
        lambda count: count > failures,
    )
    write_private(server.path("crl.pem"), server.authority.revoking(()).decode())


def test_a_certificates_names_give_its_role(server: SecureServer) -> None:
    named = server.authority.certify("whoever", uris=["spiffe://pretrade/on-call"])
    with server.channel(server.admin, pair=named) as channel:
        halt(channel)
    nobody, viewer = server.authority.certify("nobody"), server.authority.certify("viewer")
    for client in (nobody, viewer):
        with server.channel(server.admin, pair=client) as channel:
            assert refused(halt, channel) is _CODES.PERMISSION_DENIED
    with server.channel(server.decision, pair=viewer) as channel:
        assert refused(decide, channel) is _CODES.PERMISSION_DENIED
    with server.channel(server.decision, pair=server.authority.certify("trader")) as channel:
        decide(channel)

    def authors() -> list[str]:
        return [entry.control_change.author for entry in server.entries() if entry.HasField("control_change")]

    eventually(authors, lambda found: "spiffe://pretrade/on-call" in found)


def test_what_a_client_says_of_its_certificate_is_not_believed(server: SecureServer) -> None:
    """Envoy forwards certificates in a header that a client could send as well."""
    with server.channel(server.decision, pair=server.authority.certify("nobody")) as channel:
        forged = quote(server.authority.certify("trader").certificate.decode(), safe="")
        metadata = (("x-forwarded-client-cert", f'Hash=0;Cert="{forged}"'),)
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        code = refused(lambda: stub.Decide(pb.DecideRequest(), timeout=5.0, metadata=metadata))
        assert code is _CODES.PERMISSION_DENIED


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_from_1_2_on(server: SecureServer, version: ssl.TLSVersion) -> None:
    context = client_context(server)
    context.minimum_version = context.maximum_version = version
    for address in (server.decision, server.admin):
        host, port = address.split(":")
        with (
            socket.create_connection((host, int(port)), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            assert tls.version() == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]


def test_a_certificate_is_a_callers_name_over_http_too(server: SecureServer) -> None:
    url = f"https://127.0.0.1:{server.env['PRETRADE_HTTP__PORT']}"
    path = "/pretrade.admin.v1.AdminService/GetStatus"

    def showing(name: str | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=server.authority.pem.decode())
        if name is not None:
            own = server.authority.certify(name)
            certificate, key = server.path("http.pem"), server.path("http.key")
            certificate.write_bytes(own.certificate)
            write_private(key, own.key.decode())
            context.load_cert_chain(certificate, key)
        return context

    def status_of(name: str | None, **headers: str) -> int:
        with httpx.Client(base_url=url, verify=showing(name)) as web:
            assert web.get("/health").status_code == 200, "health is for everybody"
            return web.post(path, json={}, headers=headers).status_code

    async def watched_by(name: str | None) -> int:
        # In one thread: the blocking client reads and writes a TLS connection in two, which loses answers now and then.
        try:
            async with connect(f"{url.replace('https', 'wss')}/v1/signals/events", ssl=showing(name)) as socket:
                assert "features" in json.loads(await asyncio.wait_for(socket.recv(), 60.0))
        except InvalidStatus as refused:
            return refused.response.status_code
        return 101

    assert status_of("viewer") == 200
    assert status_of("trader") == 403
    assert status_of(None) == 401
    assert [asyncio.run(watched_by(name)) for name in ("viewer", "trader", None)] == [101, 403, 401]
    said = quote(server.authority.certify("admin").certificate.decode(), safe="")
    assert status_of(None, **{"x-forwarded-client-cert": f'Cert="{said}"'}) == 401, "the caller says so itself"


def test_a_replaced_certificate_is_shown_to_new_callers_over_http(server: SecureServer) -> None:
    address = f"127.0.0.1:{server.env['PRETRADE_HTTP__PORT']}"
    new = pair(server)
    serial = x509.load_pem_x509_certificate(new.certificate).serial_number
    assert served_serial(server, address) != serial
    server.install(new)
    eventually(lambda: served_serial(server, address), lambda found: found == serial)
