"""The topic `decisions` on a real broker: every row, in order, at least once, and never at the cost of a decision."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from support.batches import together
from support.waiting import until

from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.audit.v1 import packet_pb2
from server.audit.shipping.shipper import Shipper
from server.audit.shipping.shipping import ShippingSettings, TopicSettings
from server.errors import JournalFullError
from server.journal.entries import entry_of, packets
from server.journal.journal import Durability, Journal, JournalSettings
from server.journal.journal_file import JournalReader

pytestmark = pytest.mark.stack

PATIENCE_SECONDS = 30.0
INSTRUMENTS = ("BTCUSDT.SIM", "ETHUSDT.SIM")


@pytest.fixture
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A broker that the test may stop."""
    with Stack(LocalSettings(dir=tmp_path_factory.mktemp("broker")), parts={"broker"}) as stack:
        yield stack


def settings(broker: Stack, **changes: object) -> TopicSettings:
    return TopicSettings.model_validate(
        {
            "bootstrap_servers": broker.endpoints.kafka_bootstrap_servers,
            "retry_max_seconds": 0.2,
            "poll_seconds": 0.01,
            **changes,
        }
    )


def journal_in(directory: Path, **changes: object) -> Journal:
    return Journal(
        JournalSettings.model_validate({"path": directory / "journal.db", "durability": Durability.OS, **changes})
    )


def shipper(journal: Journal, topic: TopicSettings, **changes: object) -> Shipper:
    url = f"sqlite:///{journal.settings.path.with_name('audit.db')}"
    shipping = ShippingSettings.model_validate({"poll_seconds": 0.01, "drain_seconds": 0.0, **changes})
    return Shipper(journal, url, shipping, topic)


def decision(i: int, padding: int = 0) -> bytes:
    entry = packet_pb2.JournalEntry()
    entry.decision.decision.decision_id = f"d{i}"
    entry.decision.order.instrument = INSTRUMENTS[i % 2]
    entry.decision.model_input = bytes(padding)
    return entry.SerializeToString()


async def consume(broker: Stack, records: int) -> list[ConsumerRecord]:
    """The first so many records of the topic, as a downstream consumer gets them."""
    found: list[ConsumerRecord] = []
    async with AIOKafkaConsumer(
        "decisions",
        bootstrap_servers=broker.endpoints.kafka_bootstrap_servers,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=10,
    ) as consumer:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(found) < records:
                found.append(await consumer.getone())
    return found


async def test_every_entry_is_published_in_order_with_its_instrument_as_key(tmp_path: Path, own_broker: Stack) -> None:
    note = packet_pb2.JournalEntry()
    note.reply_unconfirmed.decision_id, note.reply_unconfirmed.cause = "d1", "cancelled"
    entries = [*(decision(i) for i in range(1000)), note.SerializeToString()]
    async with journal_in(tmp_path) as journal:
        async with shipper(journal, settings(own_broker)) as first:
            await asyncio.gather(*(journal.append(entry) for entry in entries[:500]))
            assert first.topic is not None
            assert await first.topic.drain(PATIENCE_SECONDS)
        async with shipper(journal, settings(own_broker)) as second:  # goes on where the first one was
            await asyncio.gather(*(journal.append(entry) for entry in entries[500:]))
            assert second.topic is not None
            assert await second.topic.drain(PATIENCE_SECONDS)
    records = await consume(own_broker, len(entries))
    by_position = {int(dict(record.headers)["position"]): record for record in records}
    assert [by_position[i + 1].value for i in range(len(entries))] == entries
    for instrument in INSTRUMENTS:
        positions = [int(dict(record.headers)["position"]) for record in records if record.key == instrument.encode()]
        assert len(positions) == 500
        assert positions == sorted(positions)
    assert by_position[1001].key is None  # the second process had not seen its decision


async def test_decisions_of_one_entry_are_published_each_by_itself(tmp_path: Path, own_broker: Stack) -> None:
    singles = [packet_pb2.JournalEntry.FromString(decision(i)) for i in range(6)]
    entry = together([one.decision for one in singles]).SerializeToString()
    async with journal_in(tmp_path) as journal, shipper(journal, settings(own_broker)) as shipping:
        await journal.append(entry)
        assert shipping.topic is not None
        assert await shipping.topic.drain(PATIENCE_SECONDS)
    records = await consume(own_broker, 6)
    assert {dict(record.headers)["position"] for record in records} == {b"1"}
    by_row = {int(dict(record.headers)["row"]): record for record in records}
    published = [packet_pb2.JournalEntry.FromString(by_row[row].value).decision for row in range(6)]
    assert published == list(packets(entry_of(entry)))
    assert [by_row[row].key for row in range(6)] == [INSTRUMENTS[row % 2].encode() for row in range(6)]
    for instrument in INSTRUMENTS:
        rows = [int(dict(record.headers)["row"]) for record in records if record.key == instrument.encode()]
        assert rows == sorted(rows)


@pytest.mark.long
@pytest.mark.fault(
    "D1",
    "The brokers of the topic `decisions` are down",
    "Decisions are not affected. The rows are published once the brokers are back.",
)
async def test_brokers_that_are_down_delay_neither_decisions_nor_sql_and_get_the_rows_once_they_are_back(
    tmp_path: Path, own_broker: Stack
) -> None:
    async with journal_in(tmp_path) as journal, shipper(journal, settings(own_broker), retained_rows=0) as shipping:
        assert shipping.topic is not None
        await journal.append(decision(0))
        assert await shipping.topic.drain(PATIENCE_SECONDS)
        await asyncio.to_thread(own_broker["broker"].kill)
        await asyncio.gather(*(journal.append(decision(i)) for i in range(1, 3001)))
        assert await shipping.drain(PATIENCE_SECONDS)
        assert shipping.last_error == ""
        await until(lambda: shipping.topic is not None and shipping.topic.last_error != "")
        assert shipping.topic.behind == 3000
        with closing(JournalReader(journal.settings.path)) as reader:
            assert reader.anchor().position <= 1  # kept for the topic
        await asyncio.to_thread(own_broker["broker"].start)
        assert await shipping.topic.drain(PATIENCE_SECONDS)
        assert (shipping.topic.outages, shipping.topic.skipped, shipping.topic.restarts) == (1, 0, 0)
    records = await consume(own_broker, 3000)
    assert {int(dict(record.headers)["position"]) for record in records} == set(range(2, 3002))


@pytest.mark.long
async def test_a_journal_that_fills_up_lets_go_of_what_brokers_do_not_take_and_counts_it(
    tmp_path: Path, own_broker: Stack
) -> None:
    async with (
        journal_in(tmp_path, max_mebibytes=4) as journal,
        shipper(journal, settings(own_broker), retained_rows=0) as shipping,
    ):
        journal.on_full(shipping.trim)
        assert shipping.topic is not None
        await asyncio.to_thread(own_broker["broker"].kill)
        await until(lambda: shipping.topic is not None and shipping.topic.last_error != "")
        for i in range(6000):  # 12 MB
            while True:
                try:
                    await journal.append(decision(i, padding=2000))
                    break
                except JournalFullError:  # never for long: SQL takes everything
                    await until(lambda: not journal.full)
        assert await shipping.drain(PATIENCE_SECONDS)
        await asyncio.to_thread(own_broker["broker"].start)
        assert await shipping.topic.drain(PATIENCE_SECONDS)
        skipped = shipping.topic.skipped
        assert 0 < skipped <= 6000  # all of them, where the last trim came when more than half was full
        await asyncio.gather(*(journal.append(decision(i)) for i in range(10)))
        assert await shipping.topic.drain(PATIENCE_SECONDS)
        assert shipping.topic.skipped == skipped
    records = await consume(own_broker, 6010 - skipped)
    assert {int(dict(record.headers)["position"]) for record in records} == set(range(skipped + 1, 6011))
