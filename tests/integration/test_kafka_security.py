"""Kafka over TLS: every client proves itself and trusts whom it is told; on a real broker behind a real handshake."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from support.harness import eventually

from feature_cache import kafka
from feature_cache.sources.publisher import EventPublisher
from feature_cache.sources.simulator import simulate
from feature_cache.worker.settings import load
from local.stack.errors import NotReadyError
from local.stack.parts import broker
from local.stack.ports import LOOPBACK, free_ports
from server.audit.reading.labels import events_of_topic
from server.security.private import write_private
from server.security.trial import TrialAuthority

pytestmark = pytest.mark.stack


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder: the authority's certificate, another authority's, a server's pair and a client's."""
    authority = TrialAuthority()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "other.pem").write_bytes(TrialAuthority("somebody else").pem)
    for name in ("broker", "client"):
        pair = authority.certify(name, ips=[LOOPBACK])
        write_private(tmp_path / f"{name}.pem", pair.certificate.decode())
        write_private(tmp_path / f"{name}.key", pair.key.decode())
    return tmp_path


@pytest.fixture
def ports() -> Iterator[tuple[int, int]]:
    """A broker's own port, and the one that it tells its clients."""
    plain, told = free_ports(2)
    argv = broker.argv(plain)
    argv[argv.index("--advertised-listener-url") + 1] = f"tcp://{LOOPBACK}:{told}"
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:

            def is_ready() -> bool:
                with suppress(NotReadyError):
                    broker.ready(plain)
                    return True
                return False

            eventually(is_ready, bool)
            yield plain, told
        finally:
            process.kill()


@pytest.fixture
async def address(ports: tuple[int, int], certificates: Path) -> AsyncIterator[str]:
    """The broker, reached over TLS by those whose certificate its authority signed."""
    plain, told = ports
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates / "ca.pem")
    context.load_cert_chain(certificates / "broker.pem", certificates / "broker.key")
    context.verify_mode = ssl.CERT_REQUIRED

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                while data := await reader.read(65_536):
                    writer.write(data)
                    await writer.drain()
            writer.close()
        except asyncio.CancelledError:  # the test is over, and its event loop ends before TLS says goodbye
            writer.transport.abort()
            raise

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(LOOPBACK, plain)
        await asyncio.gather(pass_on(reader, ours), pass_on(theirs, writer))

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(await asyncio.start_server(serve, LOOPBACK, told, ssl=context))
        yield f"{LOOPBACK}:{told}"


def secure(monkeypatch: pytest.MonkeyPatch, certificates: Path, **changes: str) -> None:
    values = {"TLS": "true", "CA": "ca.pem", "CERTIFICATE": "client.pem", "KEY": "client.key"} | changes
    for name, value in values.items():
        path = certificates / value
        monkeypatch.setenv(f"PRETRADE_KAFKA_{name}", str(path) if path.exists() else value)


async def test_events_are_published_and_read_over_tls_with_a_client_certificate(
    address: str, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secure(monkeypatch, certificates)
    events = list(simulate(3, duration_seconds=1.0))
    async with EventPublisher(address, "market.events") as publisher:
        await publisher.publish(events, speed=None)
    read = [event async for event in events_of_topic(address, "market.events")]
    assert len(read) == len(events) > 0


@pytest.mark.parametrize("changes", [{"CA": "other.pem"}, {"TLS": "false", "CA": "", "CERTIFICATE": "", "KEY": ""}])
async def test_a_broker_of_another_authority_and_a_plain_connection_are_refused(
    address: str, certificates: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    secure(monkeypatch, certificates, **changes)
    for name in [name for name, value in changes.items() if not value]:
        monkeypatch.delenv(f"PRETRADE_KAFKA_{name}")
    with pytest.raises(KafkaError):
        async with asyncio.timeout(60), EventPublisher(address, "market.events"):
            raise AssertionError("it was let in")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"CA": "/ca.pem"}, "need PRETRADE_KAFKA_TLS=true"),
        ({"TLS": "true", "KEY": "/key.pem"}, "belong together"),
        ({"TLS": "true", "CA": "/nowhere.pem"}, "No such file"),
        ({"SASL_MECHANISM": "SCRAM-SHA-512", "USERNAME": "ann"}, "belong together"),
        ({"SASL_MECHANISM": "PLAIN", "USERNAME": "ann", "PASSWORD": "secret"}, "PLAIN needs"),
        ({"PASWORD": "secret"}, "unknown settings: PRETRADE_KAFKA_PASWORD"),
    ],
)
def test_settings_that_contradict_each_other_refuse_to_start_and_show_no_password(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], problem: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"PRETRADE_KAFKA_{name}", value)
    with pytest.raises(ValueError, match=problem) as refused:
        load()
    assert "secret" not in str(refused.value)


async def test_name_and_password_are_what_aiokafka_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TLS": "true", "SASL_MECHANISM": "SCRAM-SHA-512", "USERNAME": "ann", "PASSWORD": "pw"}.items():
        monkeypatch.setenv(f"PRETRADE_KAFKA_{name}", value)
    options = kafka.client("broker:9096")
    assert (options["security_protocol"], options["sasl_plain_password"]) == ("SASL_SSL", "pw")
    await AIOKafkaProducer(**options).stop()  # it checks them when it is made
