"""`python -m feature_cache.bars` with a real broker: killed, and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pyarrow.parquet
import pytest

from feature_cache.bars.bar import Bar
from feature_cache.bars.maker import BarMaker
from feature_cache.bars.store import BarStore, as_row
from feature_cache.sources.publisher import EventPublisher
from feature_cache.sources.simulator import simulate
from pretrade.market.v1 import market_pb2 as pb

pytestmark = pytest.mark.stack

NAME: Final = "BTCUSDT.SIM"
BEFORE_MIDNIGHT_NS: Final = 1_700_006_400 * 10**9 - 15 * 10**9


@contextmanager
def keeper(brokers: str, url: str, parquet: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    settings = {"DATABASE_URL": url, "KAFKA_BOOTSTRAP_SERVERS": brokers, "PARQUET_DIR": str(parquet)}
    environment = os.environ | {f"PRETRADE_BARS_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "feature_cache.bars"]
    with log.open("ab") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.kill()


async def publish(brokers: str, events: list[pb.MarketEvent]) -> None:
    async with EventPublisher(brokers) as publisher:
        await publisher.publish(events, speed=None)
    assert publisher.failed == 0


async def until_there_are(store: BarStore, count: int) -> None:
    async with asyncio.timeout(40):
        while len(await asyncio.to_thread(store.last, NAME, "1s", 1000)) < count:  # noqa: ASYNC110 - another process's work
            await asyncio.sleep(0.1)


async def test_a_process_that_is_killed_goes_on_and_no_bar_is_missing_or_there_twice(
    kafka_bootstrap_servers: str, tmp_path: Path
) -> None:
    events = list(simulate(1, [NAME], start_ns=BEFORE_MIDNIGHT_NS, duration_seconds=31, events_per_second=40))
    expected: list[Bar] = []
    maker = BarMaker(NAME, expected.append)
    for event in events:
        maker.on_event(event)
    half = next(place for place, one in enumerate(events) if one.event_time_ns > BEFORE_MIDNIGHT_NS + 12 * 10**9)
    url, parquet = f"sqlite:///{tmp_path / 'bars.db'}", tmp_path / "parquet"
    store = BarStore(url)
    store.prepare()
    await publish(kafka_bootstrap_servers, events[:half])
    with keeper(kafka_bootstrap_servers, url, parquet, tmp_path / "log") as process:
        await until_there_are(store, 12)
        process.kill()
        process.wait()
    await publish(kafka_bootstrap_servers, events[half:])
    with keeper(kafka_bootstrap_servers, url, parquet, tmp_path / "log") as process:
        await until_there_are(store, 31)
        async with asyncio.timeout(20):
            while not list(parquet.glob("*.parquet")):  # noqa: ASYNC110 - another process's work
                await asyncio.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
    for interval in ("1s", "10s"):
        made = [as_row(bar) for bar in expected if bar.interval == interval]
        assert store.last(NAME, interval, 1000) == made
    (day,) = parquet.iterdir()
    rows = pyarrow.parquet.read_table(day).to_pylist()
    assert [row["start"].second for row in rows if row["interval"] == "1s"] == list(range(45, 60))
    store.close()


def test_settings_that_are_wrong_are_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "feature_cache.bars"]
    for url, message in (("mysql://x/y", "must begin with sqlite://"), (None, "Field required")):
        environment = os.environ | ({"PRETRADE_BARS_DATABASE_URL": url} if url else {})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 2
        assert "PRETRADE_BARS_DATABASE_URL: " in done.stderr
        assert message in done.stderr
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=30)
    assert "PRETRADE_BARS_PARQUET_DIR" in done.stdout
