"""The shipping process against real databases that come and go, and parents and children that are killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
from support.harness import eventually, has_ended
from support.waiting import until

from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.audit.v1 import packet_pb2
from server.audit.reading.query import AuditQuery
from server.audit.reading.verify import Verified, verify
from server.audit.shipping.shipper import Shipper
from server.audit.shipping.shipping import Progress, ShippingSettings, Task
from server.journal.journal import Durability, Journal, JournalSettings
from server.journal.journal_file import JournalFile, JournalReader

pytestmark = pytest.mark.stack

CHILD = Path(__file__).parents[1] / "support" / "audit_child.py"
PATIENCE_SECONDS = 30.0


def shipping(**changes: object) -> ShippingSettings:
    return ShippingSettings.model_validate(
        {"poll_seconds": 0.01, "retry_min_seconds": 0.05, "retry_max_seconds": 0.2, **changes}
    )


def journal_in(directory: Path) -> Journal:
    return Journal(JournalSettings(path=directory / "journal.db", durability=Durability.OS))


def entry(decision_id: str) -> bytes:
    packet = packet_pb2.JournalEntry()
    packet.decision.decision.decision_id = decision_id
    return packet.SerializeToString()


def unconfirmed(decision_id: str) -> bytes:
    packet = packet_pb2.JournalEntry()
    packet.reply_unconfirmed.decision_id = decision_id
    packet.reply_unconfirmed.cause = "cancelled"
    return packet.SerializeToString()


async def append(journal: Journal, ids: list[str]) -> None:
    await asyncio.gather(*(journal.append(entry(one)) for one in ids))


def stored_in_order(url: str) -> list[str]:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(sa.text("SELECT decision_id FROM decisions ORDER BY journal_position"))
        ids = [one for (one,) in found]
    engine.dispose()
    return ids


def shipping_processes(of: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(of).children() if "server.audit" in child.cmdline()]


@pytest.fixture
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A PostgreSQL that the test may stop."""
    with Stack(LocalSettings(dir=tmp_path_factory.mktemp("postgres")), parts={"postgres"}) as stack:
        yield stack


async def test_decisions_reach_postgresql_and_unconfirmed_replies_change_their_status(
    tmp_path: Path, database_url: str
) -> None:
    ids = [f"d{i}" for i in range(2000)]
    async with journal_in(tmp_path) as journal, Shipper(journal, database_url, shipping()) as shipper:
        await append(journal, ids)
        await journal.append(unconfirmed("d7"))
        assert await shipper.drain(PATIENCE_SECONDS)
        assert (shipper.unshipped, shipper.last_error, shipper.outages) == (0, "", 0)
        with closing(AuditQuery(database_url, None)) as query:
            assert query.get("d7").reply_status == "reply_unconfirmed:cancelled"
            assert query.get("d8").reply_status == "replied"
    assert stored_in_order(database_url) == ids
    assert [
        (one.where, one.first, one.last)
        for one in verify(database_url, tmp_path / "journal.db")
        if isinstance(one, Verified)
    ] == [("database", 1, 2001), ("journal", 1, 2001)]


async def test_a_database_that_is_down_delays_nothing_and_gets_everything_once_in_order(
    tmp_path: Path, own_postgres: Stack
) -> None:
    url = own_postgres.endpoints.database_url
    assert url is not None
    postgres = own_postgres["postgres"]
    async with journal_in(tmp_path) as journal, Shipper(journal, url, shipping()) as shipper:
        await append(journal, [f"before-{i}" for i in range(500)])
        assert await shipper.drain(PATIENCE_SECONDS)
        await asyncio.to_thread(postgres.kill)
        await append(journal, [f"during-{i}" for i in range(500)])
        await until(lambda: shipper.last_error != "")
        await append(journal, [f"still-{i}" for i in range(500)])
        assert journal.written == 1500
        assert shipper.unshipped == 1000
        assert not await shipper.drain(0.2)
        await asyncio.to_thread(postgres.start)
        assert await shipper.drain(PATIENCE_SECONDS)
        assert (shipper.last_error, shipper.outages, shipper.restarts) == ("", 1, 0)
    assert stored_in_order(url) == [f"{when}-{i}" for when in ("before", "during", "still") for i in range(500)]


@pytest.mark.long
async def test_a_killed_shipping_process_is_replaced_and_nothing_is_lost_or_doubled(
    tmp_path: Path, database_url: str
) -> None:
    ids: list[str] = []
    async with journal_in(tmp_path) as journal, Shipper(journal, database_url, shipping(batch_rows=50)) as shipper:
        for round_ in range(3):
            position = shipper.position
            ids += (batch := [f"{round_}-{i}" for i in range(1000)])
            await append(journal, batch)
            await until(lambda position=position: shipper.position > position)  # type: ignore[misc]
            (process,) = shipping_processes(os.getpid())
            process.kill()
            await until(lambda round_=round_: shipper.restarts == round_ + 1)  # type: ignore[misc]
        assert await shipper.drain(PATIENCE_SECONDS)
    assert stored_in_order(database_url) == ids
    assert not shipping_processes(os.getpid())


@pytest.mark.long
async def test_the_outage_is_over_when_the_replacement_has_nothing_to_ship(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    async with journal_in(tmp_path) as journal, Shipper(journal, url, shipping()) as shipper:
        await until(lambda: bool(shipping_processes(os.getpid())))
        shipping_processes(os.getpid())[0].kill()
        await until(lambda: shipper.last_error != "")
        assert shipper.last_error == "the shipping process ended with -9"
        await until(lambda: shipper.last_error == "")
        assert (shipper.outages, shipper.restarts, shipper.unshipped) == (1, 1, 0)


async def test_shipped_rows_are_trimmed_and_found_in_the_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    path = tmp_path / "journal.db"
    async with journal_in(tmp_path) as journal, Shipper(journal, url, shipping(retained_rows=100)) as shipper:
        await append(journal, [str(i) for i in range(5000)])
        assert await shipper.drain(PATIENCE_SECONDS)
        with closing(JournalReader(path)) as reader:
            await until(lambda: reader.anchor().position >= 3900)
            assert reader.anchor().position <= 4900
    for places, decision_id, found_in in (((url, path), "0", "database"), ((None, path), "4950", "journal")):
        with closing(AuditQuery(*places)) as query:
            assert query.get(decision_id).found_in == found_in
    verified = [one for one in verify(url, path) if isinstance(one, Verified)]
    assert [(one.where, one.last) for one in verified] == [("database", 5000), ("journal", 5000)]


@pytest.mark.long
async def test_a_journal_that_few_large_rows_fill_takes_more_as_soon_as_they_are_shipped(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    packet = packet_pb2.JournalEntry()
    packet.decision.model_input = bytes(20_000)
    settings = JournalSettings(path=tmp_path / "journal.db", durability=Durability.OS, max_mebibytes=1)
    async with Journal(settings) as journal, Shipper(journal, url, shipping()) as shipper:
        journal.on_full(shipper.trim)
        for i in range(300):  # six times as much as fits
            packet.decision.decision.decision_id = str(i)
            await until(lambda: not journal.full)
            await journal.append(packet.SerializeToString())
        assert journal.outages > 0
        assert await shipper.drain(PATIENCE_SECONDS)
    assert stored_in_order(url) == [str(i) for i in range(300)]


@pytest.mark.long
async def test_verification_beside_a_busy_server_raises_no_false_alarm(tmp_path: Path, database_url: str) -> None:
    path = tmp_path / "journal.db"
    settings = shipping(retained_rows=0, batch_rows=100)
    async with journal_in(tmp_path) as journal, Shipper(journal, database_url, settings) as shipper:
        await append(journal, ["first"])
        assert await shipper.drain(PATIENCE_SECONDS)
        verifications = asyncio.gather(
            *(asyncio.to_thread(lambda: list(verify(database_url, path))) for _ in range(10))
        )
        batch = 0
        while not verifications.done():
            await append(journal, [f"{batch}-{i}" for i in range(100)])
            batch += 1
        assert all(len(verified) == 2 for verified in await verifications)


async def test_the_rest_is_shipped_after_the_next_start(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    obstacle = tmp_path / "audit.db"
    obstacle.mkdir()
    async with journal_in(tmp_path) as journal, Shipper(journal, url, shipping(drain_seconds=0.1)):
        await append(journal, ["left behind"])
    obstacle.rmdir()
    async with journal_in(tmp_path) as journal, Shipper(journal, url, shipping()) as shipper:
        assert await shipper.drain(PATIENCE_SECONDS)
    assert stored_in_order(url) == ["left behind"]


def test_the_shipping_process_ends_when_its_input_does(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    task = Task(journal=path, slot="here", database_url=f"sqlite:///{tmp_path / 'audit.db'}", settings=shipping())
    with closing(JournalFile(path, sync_commits=False)) as journal:
        journal.append([entry("d")])
    with subprocess.Popen(
        [sys.executable, "-m", "server.audit"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(task.model_dump_json() + "\n")
        for position in (0, 1):
            assert Progress.model_validate_json(process.stdout.readline()) == Progress(position=position, error="")
        process.stdin.close()
        try:
            assert process.wait(PATIENCE_SECONDS) == 0
        finally:
            process.kill()


@pytest.mark.long
def test_the_shipping_process_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    with subprocess.Popen(
        [sys.executable, str(CHILD), str(tmp_path / "journal.db"), url, "d"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        acknowledged: list[bytes] = []
        while not (found := shipping_processes(parent.pid)) or len(acknowledged) < 500:
            acknowledged.append(parent.stdout.readline())
        parent.kill()
        eventually(lambda: [one for one in found if not has_ended(one)], lambda alive: not alive)
