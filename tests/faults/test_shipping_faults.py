"""The shipping process at its worst instant: the database has committed, and nobody has heard of it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from pretrade.audit.v1 import packet_pb2
from server.audit.reading.verify import Verified, verify
from server.audit.shipping.shipper import Shipper
from server.audit.shipping.shipping import ShippingSettings
from server.journal.journal import Durability, Journal, JournalSettings
from server.journal.journal_file import JournalReader

pytestmark = pytest.mark.stack

PATIENCE_SECONDS = 60.0
ROWS, COMMIT = b"COPY journal_entries", b"COMMIT\0"


@dataclass
class Proxy:
    """Between the shipping process and PostgreSQL: hands bytes on, except the news that rows were committed."""

    upstream: tuple[str, int]
    on_committed: Callable[[], None]
    unheard: int = 0
    """Commits that the database has acknowledged and the shipping process has not heard of."""
    wanted: int = 2
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._connection, args=(client,), daemon=True).start()

    def _connection(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.upstream) as server:
            committing = threading.Event()
            threading.Thread(target=self._replies, args=(server, client, committing), daemon=True).start()
            rows = False
            with suppress(OSError):  # the other side is gone
                while data := _receive(client):
                    rows = rows or ROWS in data  # not the transactions that prepare the tables
                    if rows and COMMIT in data and self.unheard < self.wanted:
                        committing.set()
                    server.sendall(data)

    def _replies(self, server: socket.socket, client: socket.socket, committing: threading.Event) -> None:
        with suppress(OSError):
            while data := _receive(server):
                if committing.is_set():
                    self.unheard += 1
                    self.on_committed()
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""


@contextmanager
def between(url: str, on_committed: Callable[[], None]) -> Iterator[tuple[Proxy, str]]:
    """A proxy in front of the database, and the URL that leads through it."""
    parsed = sa.make_url(url)
    proxy = Proxy((str(parsed.host), int(parsed.port or 5432)), on_committed)
    host, port = proxy.listener.getsockname()
    thread = threading.Thread(target=proxy.serve)
    thread.start()
    try:
        yield proxy, parsed.set(host=host, port=port).render_as_string(hide_password=False)
    finally:
        proxy.listener.shutdown(socket.SHUT_RDWR)
        proxy.listener.close()
        thread.join()


def entry(decision_id: str) -> bytes:
    packet = packet_pb2.JournalEntry()
    packet.decision.decision.decision_id = decision_id
    return packet.SerializeToString()


def kill_the_shipping_process() -> None:
    for child in psutil.Process(os.getpid()).children():
        if "server.audit" in child.cmdline():
            child.kill()


@pytest.mark.long
@pytest.mark.parametrize(
    "on_committed",
    [
        pytest.param(
            lambda: None,
            id="lost",
            marks=pytest.mark.fault(
                "D4", "The acknowledgement of a database commit is lost", "The rows are shipped again and stored once."
            ),
        ),
        pytest.param(
            kill_the_shipping_process,
            id="killed",
            marks=pytest.mark.fault(
                "D4",
                "The shipper is killed between COMMIT and trimming the journal",
                "The rows are shipped again and stored once.",
            ),
        ),
    ],
)
async def test_a_commit_that_nobody_heard_of_is_neither_repeated_nor_lost(
    tmp_path: Path, database_url: str, seen: Callable[[str], None], on_committed: Callable[[], None]
) -> None:
    ids = [f"d{i}" for i in range(3000)]
    settings = ShippingSettings(batch_rows=100, poll_seconds=0.01, retry_max_seconds=0.2, retained_rows=0)
    journal_settings = JournalSettings(path=tmp_path / "journal.db", durability=Durability.OS)
    with between(database_url, on_committed) as (proxy, url):
        async with Journal(journal_settings) as journal, Shipper(journal, url, settings) as shipper:
            for i in range(0, len(ids), 500):
                await asyncio.gather(*(journal.append(entry(one)) for one in ids[i : i + 500]))
            assert await shipper.drain(PATIENCE_SECONDS)
            restarts = shipper.restarts
    assert proxy.unheard == proxy.wanted
    engine = sa.create_engine(database_url)
    with engine.connect() as connection:
        stored = connection.scalars(sa.text("SELECT decision_id FROM decisions ORDER BY journal_position")).all()
    engine.dispose()
    assert stored == ids
    verified = [one for one in verify(database_url, journal_settings.path) if isinstance(one, Verified)]
    assert [(one.where, one.last) for one in verified] == [("database", len(ids)), ("journal", len(ids))]
    with closing(JournalReader(journal_settings.path)) as reader:
        assert reader.anchor().position <= len(ids)
    seen(f"{proxy.unheard} commits unheard of, {restarts} restarts; {len(stored)} rows, each once, in order")
