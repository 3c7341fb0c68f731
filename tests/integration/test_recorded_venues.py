"""`replay` of recordings of two venues, through a real broker."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer

from pretrade.market.v1 import market_pb2 as pb

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
FOLDERS = [DATA / "kraken_v1", DATA / "coinbase_pro"]
pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(not all(folder.is_dir() for folder in FOLDERS), reason="the recorded sessions are not there"),
]


@pytest.mark.long
async def test_replay_publishes_every_update_of_both_venues(kafka_bootstrap_servers: str) -> None:
    command = [sys.executable, "-m", "feature_cache.sources.cli", "replay", *map(str, FOLDERS)]
    replay = await asyncio.create_subprocess_exec(
        *command, "--speed", "max", "--kafka", kafka_bootstrap_servers, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        _, said = await replay.communicate()
    assert replay.returncode == 0, said.decode()

    consumer = AIOKafkaConsumer(
        "market.events",
        bootstrap_servers=kafka_bootstrap_servers,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=10,
    )
    await consumer.start()
    counts: Counter[tuple[str, str | None]] = Counter()
    try:
        async with asyncio.timeout(60):
            ends = await consumer.end_offsets(sorted(consumer.assignment()))
            while any([await consumer.position(partition) < end for partition, end in ends.items()]):
                for records in (await consumer.getmany(timeout_ms=100)).values():
                    for record in records:
                        event = pb.MarketEvent.FromString(record.value)
                        assert record.key == event.instrument.encode()
                        counts[event.instrument.partition(".")[2], event.WhichOneof("event")] += 1
    finally:
        await consumer.stop()
    assert (counts["KRAKEN", "delta"], counts["COINBASE", "delta"]) == (4_269, 9_719)
    assert (counts["KRAKEN", "trade"], counts["COINBASE", "trade"]) == (10, 97)
