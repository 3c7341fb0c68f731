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
from urllib.request import urlopen

import pyarrow.parquet
import pytest
from prometheus_client.parser import text_string_to_metric_families

from feature_cache.bars.bar import Bar
from feature_cache.bars.maker import BarMaker
from feature_cache.bars.store import BarStore, as_row
from feature_cache.sources.publisher import EventPublisher
from feature_cache.sources.simulator import START_NS, simulate
from local.stack.ports import free_ports
from pretrade.market.v1 import market_pb2 as pb

pytestmark = pytest.mark.stack

NAME: Final = "BTCUSDT.SIM"
PARTITIONS: Final = 4
BEFORE_MIDNIGHT_NS: Final = 1_700_006_400 * 10**9 - 15 * 10**9


@contextmanager
def keeper(brokers: str, url: str, parquet: Path, log: Path, port: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    settings = {"DATABASE_URL": url, "KAFKA_BOOTSTRAP_SERVERS": brokers, "PARQUET_DIR": str(parquet)}
    settings["METRICS_PORT"] = str(port)
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


async def until_there_are(store: BarStore, count: int, name: str = NAME) -> None:
    async with asyncio.timeout(40):
        while len(await asyncio.to_thread(store.last, name, "1s", 1000)) < count:  # noqa: ASYNC110 - another process's work
            await asyncio.sleep(0.1)


def bars_of(events: list[pb.MarketEvent]) -> list[Bar]:
    """The bars of one instrument."""
    made: list[Bar] = []
    maker = BarMaker(events[0].instrument, made.append)
    for event in events:
        maker.on_event(event)
    return made


def held(port: int) -> int:
    """How many partitions a keeper says that it holds; 0 while it is not well."""
    url = f"http://127.0.0.1:{port}"
    try:
        with urlopen(f"{url}/healthz", timeout=5.0), urlopen(f"{url}/metrics", timeout=5.0) as answer:
            families = text_string_to_metric_families(answer.read().decode())
    except OSError:
        return 0
    return next(int(one.samples[0].value) for one in families if one.name == "pretrade_bars_partitions")


@pytest.mark.long
async def test_a_process_that_is_killed_goes_on_and_no_bar_is_missing_or_there_twice(
    kafka_bootstrap_servers: str, tmp_path: Path
) -> None:
    events = list(simulate(1, [NAME], start_ns=BEFORE_MIDNIGHT_NS, duration_seconds=31, events_per_second=40))
    expected = bars_of(events)
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


@pytest.mark.long
async def test_two_processes_share_the_partitions_and_one_takes_over_what_a_killed_one_had(
    kafka_bootstrap_servers: str, tmp_path: Path
) -> None:
    names = [f"{name}.SIM" for name in ("ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT")]
    by_name = {name: list(simulate(1, [name], duration_seconds=24, events_per_second=20)) for name in names}
    url, parquet, log = f"sqlite:///{tmp_path / 'bars.db'}", tmp_path / "parquet", tmp_path / "log"
    store = BarStore(url)
    store.prepare()

    def part(first_second: int, last_second: int) -> list[pb.MarketEvent]:
        start = START_NS + first_second * 10**9, START_NS + last_second * 10**9
        found = (one for events in by_name.values() for one in events if start[0] <= one.event_time_ns < start[1])
        return sorted(found, key=lambda event: event.receive_time_ns)

    await publish(kafka_bootstrap_servers, part(0, 8))
    first_port, second_port = free_ports(2)
    with keeper(kafka_bootstrap_servers, url, parquet, log, first_port) as first:
        await until_there_are(store, 7, names[0])
        with keeper(kafka_bootstrap_servers, url, parquet, log, second_port):
            async with asyncio.timeout(40):
                seen: set[bool] = set()
                number = 8
                while seen != {True}:  # what a keeper holds it knows when it has read from it
                    await publish(kafka_bootstrap_servers, part(number, number + 1))
                    number = min(number + 1, 16)
                    await asyncio.sleep(0.5)
                    shares = [await asyncio.to_thread(held, port) for port in (first_port, second_port)]
                    seen = {0 < share < PARTITIONS for share in shares}
            first.kill()
            await publish(kafka_bootstrap_servers, part(number, 25))
            for name in names:
                await until_there_are(store, len([one for one in bars_of(by_name[name]) if one.interval == "1s"]), name)
    for name in names:
        for interval in ("1s", "10s"):
            made = [as_row(bar) for bar in bars_of(by_name[name]) if bar.interval == interval]
            assert store.last(name, interval, 1000) == made
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
