"""Live market data from exchanges on loopback to a real broker, through what happens to live connections."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.request import urlopen

import pytest
from aiokafka import AIOKafkaConsumer
from support.exchange_servers import PATIENCE_SECONDS, BinanceServer, CoinbaseServer, KrakenServer, RecordedServer
from support.waiting import until
from typer import Typer
from typer.testing import CliRunner

from feature_cache.engine.book import OrderBook
from feature_cache.feeds import binance_streams
from feature_cache.sources.exchanges import Binance, Coinbase, Exchange, Kraken
from feature_cache.sources.ingest import Ingest, IngestSettings
from feature_cache.sources.ingest_cli import ingest
from feature_cache.sources.publisher import EventPublisher, with_snapshots
from feature_cache.sources.recorder import Recorder, read_lines
from feature_cache.sources.session import instruments, read_session, session_files
from pretrade.market.v1 import market_pb2 as pb

pytestmark = pytest.mark.stack

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"

QUICK = IngestSettings(
    silence_seconds=10, reconnect_min_seconds=0.05, reconnect_max_seconds=0.2, resync_min_seconds=0.2, ping_seconds=5
)


@asynccontextmanager
async def ingesting(
    exchange: Exchange, kafka: str, settings: IngestSettings = QUICK, recording: Recorder | None = None
) -> AsyncIterator[Ingest]:
    """The feed running; left, it has ended as on SIGTERM and everything is delivered."""
    async with EventPublisher(kafka) as publisher:
        feed = Ingest(exchange, publisher, settings, recording)
        task = asyncio.create_task(feed.run())
        try:
            yield feed
        finally:
            task.cancel()
            done = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError), done
    assert publisher.failed == feed.undelivered == 0


async def published(kafka: str) -> list[pb.MarketEvent]:
    """Everything in the topic; the events of one instrument in their order."""
    consumer = AIOKafkaConsumer(
        "market.events", bootstrap_servers=kafka, auto_offset_reset="earliest", fetch_max_wait_ms=10
    )
    await consumer.start()
    found = []
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            ends = await consumer.end_offsets(sorted(consumer.assignment()))
            while any([await consumer.position(partition) < end for partition, end in ends.items()]):
                for records in (await consumer.getmany(timeout_ms=100)).values():
                    found += [pb.MarketEvent.FromString(record.value) for record in records]
    finally:
        await consumer.stop()
    return found


def of(events: list[pb.MarketEvent], instrument: str) -> list[pb.MarketEvent]:
    return [event for event in events if event.instrument == instrument]


def resets(events: list[pb.MarketEvent]) -> list[str]:
    return [event.reset.reason for event in events if event.HasField("reset")]


def rebuilt(events: list[pb.MarketEvent]) -> OrderBook:
    """The book as whoever reads the topic has it before the feed takes its leave."""
    book = OrderBook()
    for event in events:
        if event.HasField("snapshot"):
            book.apply_snapshot(event.snapshot)
        elif event.HasField("delta"):
            book.apply_delta(event.delta)
        elif event.HasField("reset"):
            if event.reset.reason == "reconnect" and event is last_reconnect(events):
                break
            book.reset()
    return book


def last_reconnect(events: list[pb.MarketEvent]) -> pb.MarketEvent:
    """The reset with which the connection ended when the feed was stopped."""
    return [event for event in events if event.HasField("reset") and event.reset.reason == "reconnect"][-1]


def same(book: OrderBook, truth: OrderBook) -> bool:
    return book.valid and all(
        ours.top(10_000) == theirs.top(10_000) for ours, theirs in ((book.bids, truth.bids), (book.asks, truth.asks))
    )


@pytest.mark.parametrize("venue", binance_streams.VENUES)
@pytest.mark.fault(
    "C8",
    "An exchange closes the connection, skips updates or sends garbage",
    "Books are unknown, then fresh again, without an operator.",
)
async def test_binance_books_are_the_exchanges_through_a_lost_connection_a_gap_and_garbage(
    venue: str, kafka_bootstrap_servers: str, tmp_path: Path
) -> None:
    symbols = ("BTCUSDT", "ETHUSDT")
    names = [f"{symbol}.{venue}" for symbol in symbols]
    async with BinanceServer(venue, symbols).running() as server:
        exchange = Binance(venue, symbols, server.url, server.rest_url)
        connections = len(exchange.streams)
        recording = Recorder(tmp_path, venue, time.time_ns())
        async with ingesting(exchange, kafka_bootstrap_servers, recording=recording) as feed:
            await server.until(connections)
            assert not any(feed.books.values())
            await server.play(400)
            await until(lambda: feed.problem is None)

            await server.play(400, lose="delta")
            await until(lambda: feed.doubts == 1)
            await server.play(100)
            await until(lambda: all(feed.books.values()))
            assert len(server.rest_requests) == 3

            await server.play(200, garbage="<html>bad gateway</html>")
            await until(lambda: feed.refused == 1)
            assert (all(feed.books.values()), feed.losses) == (True, 0)

            await server.drop()
            await until(lambda: not any(feed.books.values()))
            await server.until(2 * connections)
            await server.play(400)  # fewer may be one burst of trades, without an update of a book
            await until(lambda: all(feed.books.values()))
            await server.play(100)
            await until(lambda: same(feed.book(names[0]), server.books["BTCUSDT"]))
            await until(lambda: same(feed.book(names[1]), server.books["ETHUSDT"]))
    events = await published(kafka_bootstrap_servers)
    for name, symbol in zip(names, symbols, strict=True):
        assert same(rebuilt(of(events, name)), server.books[symbol])
        assert resets(of(events, name)) == ["start", "reconnect", "reconnect", "closed"]

    # The recording replayed gives the same events, in the same order, up to when each was published.
    files = session_files([tmp_path])
    assert instruments(files) == names
    replayed = list(with_snapshots(read_session(files)))
    for name in names:
        assert stripped(of(replayed, name)) == [
            event for event in stripped(of(events, name)) if event.reset.reason not in ("start", "closed")
        ]


def stripped(events: list[pb.MarketEvent]) -> list[pb.MarketEvent]:
    for event in events:
        event.publish_time_ns = 0
    return events


@pytest.mark.skipif(not DATA.is_dir(), reason="the recorded sessions are not there")
async def test_a_recorded_binance_session_played_live_gives_the_book_of_its_replay(
    kafka_bootstrap_servers: str,
) -> None:
    path = DATA / "binance_spot" / "btcusdt_20240808.gz"
    with gzip.open(path) as lines:
        messages = [line.partition(b" ")[2] for line in itertools.islice(lines, 4_000)]
    (snapshot,) = (message for message in messages if b"lastUpdateId" in message)
    streamed = [message for message in messages if message is not snapshot]
    async with RecordedServer(streamed, json.loads(snapshot)).running() as server:
        exchange = Binance(binance_streams.SPOT, ["BTCUSDT"], server.url, server.rest_url)
        async with ingesting(exchange, kafka_bootstrap_servers) as feed:
            await until(lambda: feed.messages == len(streamed) and all(feed.books.values()))
            assert (feed.refused, feed.doubts, feed.losses, len(server.rest_requests)) == (0, 0, 0, 1)
            replayed = OrderBook()
            for event in itertools.islice(read_session([path]), 4_000):
                if event.HasField("snapshot"):
                    replayed.apply_snapshot(event.snapshot)
                elif (
                    event.HasField("delta")
                    and event.delta.last_update_id <= feed.book("BTCUSDT.BINANCE").last_update_id
                ):
                    replayed.apply_delta(event.delta)
            assert same(feed.book("BTCUSDT.BINANCE"), replayed)


@pytest.mark.skipif(not DATA.is_dir(), reason="the recorded sessions are not there")
async def test_a_recorded_kraken_session_played_live_has_every_checksum_right(kafka_bootstrap_servers: str) -> None:
    lines = [line for path in sorted((DATA / "kraken_v1").glob("*.ws.*.gz")) for line in read_lines(path)]
    lines.sort(key=lambda line: line.receive_time_ns)
    messages = [line.message for line in lines if not line.arrow]
    pairs = sorted({json.loads(message)[-1] for message in messages if message.startswith(b"[")})
    async with RecordedServer(messages).running() as server:
        exchange = Kraken(pairs, server.url)
        async with ingesting(exchange, kafka_bootstrap_servers) as feed:
            await until(lambda: feed.messages == len(messages))
            assert (all(feed.books.values()), feed.refused, feed.doubts) == (True, 0, 0)
    kinds = Counter(event.WhichOneof("event") for event in await published(kafka_bootstrap_servers))
    assert (kinds["delta"], kinds["trade"]) == (4_269, 10)


@pytest.mark.fault("C8", "An exchange refuses a snapshot", "The feed asks again when the exchange allows it.")
async def test_a_refused_snapshot_is_asked_for_again_when_the_exchange_wants(kafka_bootstrap_servers: str) -> None:
    async with BinanceServer(binance_streams.SPOT, ["BTCUSDT"]).running() as server:
        server.refusals.append((HTTPStatus.TOO_MANY_REQUESTS, {"Retry-After": "2"}))
        server.refusals.append((HTTPStatus.BAD_GATEWAY, {}))
        exchange = Binance(binance_streams.SPOT, ["BTCUSDT"], server.url, server.rest_url)
        async with ingesting(exchange, kafka_bootstrap_servers) as feed:
            await server.until(1)
            await server.play(100)
            await server.until(1, "rest_requests")
            began = time.monotonic()
            await server.until(2, "rest_requests")
            assert time.monotonic() - began >= 1.9
            await until(lambda: all(feed.books.values()))
            assert (feed.requests, feed.request_failures) == (3, 2)


async def test_a_slow_exchange_is_waited_for_with_what_it_sends_meanwhile(kafka_bootstrap_servers: str) -> None:
    async with BinanceServer(binance_streams.SPOT, ["BTCUSDT"]).running() as server:
        server.rest_seconds = 1.0
        exchange = Binance(binance_streams.SPOT, ["BTCUSDT"], server.url, server.rest_url)
        async with ingesting(exchange, kafka_bootstrap_servers) as feed:
            await server.until(1)
            for _ in range(10):
                await server.play(30)
            await until(lambda: all(feed.books.values()))
            assert same(feed.book("BTCUSDT.BINANCE"), server.books["BTCUSDT"])


@pytest.mark.fault("C8", "An exchange falls silent", "The feed reconnects without an operator.")
async def test_a_connection_that_falls_silent_is_made_anew(kafka_bootstrap_servers: str) -> None:
    async with BinanceServer(binance_streams.SPOT, ["BTCUSDT"]).running() as server:
        exchange = Binance(binance_streams.SPOT, ["BTCUSDT"], server.url, server.rest_url)
        settings = QUICK.model_copy(update={"silence_seconds": 0.3})
        async with ingesting(exchange, kafka_bootstrap_servers, settings) as feed:
            await server.until(3, "accepted")
            assert feed.losses >= 2


async def test_an_exchange_that_is_not_there_is_tried_again_until_it_is(kafka_bootstrap_servers: str) -> None:
    server = KrakenServer(["BTC/USD"])
    async with server.running():
        url = server.url
    async with ingesting(Kraken(["BTC/USD"], url), kafka_bootstrap_servers) as feed:
        await until(lambda: feed.losses >= 3)
        assert (feed.connected, feed.problem) == (0, "not connected")


async def test_kraken_subscribes_again_after_a_failed_checksum(kafka_bootstrap_servers: str) -> None:
    pairs = ["BTC/USD", "ETH/USD"]
    async with KrakenServer(pairs).running() as server:
        async with ingesting(Kraken(pairs, server.url), kafka_bootstrap_servers) as feed:
            await server.until(3)
            await server.update("BTC/USD", "99.5", "3.00000000")
            await server.update("ETH/USD", "99.5", "4.00000000")
            await until(lambda: all(feed.books.values()))
            await server.update("BTC/USD", "99.4", "5.00000000", lost=True)
            await server.update("BTC/USD", "99.3", "6.00000000")
            await server.until(5)
            await until(lambda: all(feed.books.values()))
            assert (feed.doubts, feed.losses, feed.connects) == (1, 0, 1)
            await server.update("BTC/USD", "99.2", "7.00000000")
            await until(lambda: feed.book("BTC-USD.KRAKEN").bids.sizes.get(992) == 700_000_000)
        again = server.requests[3:]
        assert [(request["method"], request["params"]["symbol"]) for request in again] == [
            ("unsubscribe", ["BTC/USD"]),
            ("subscribe", ["BTC/USD"]),
        ]
    events = await published(kafka_bootstrap_servers)
    assert resets(of(events, "BTC-USD.KRAKEN")) == ["start", "checksum", "reconnect", "closed"]
    assert resets(of(events, "ETH-USD.KRAKEN")) == ["start", "reconnect", "closed"]
    assert {994, 993, 992} <= rebuilt(of(events, "BTC-USD.KRAKEN")).bids.sizes.keys()


async def test_coinbase_level_2_is_connected_anew_when_an_update_cannot_be_read(kafka_bootstrap_servers: str) -> None:
    async with CoinbaseServer().running() as server:
        exchange = Coinbase(["BTC-USD"], url=server.url)
        async with ingesting(exchange, kafka_bootstrap_servers) as feed:
            await server.until(1)
            await server.bid("100.50", "1.0")
            await until(lambda: all(feed.books.values()))
            for connection in server.connections:
                await connection.send('{"type":"something_new","product_id":"BTC-USD"}')
            await until(lambda: feed.refused == 1)
            assert feed.losses == 0
            await server.bid("100.60", "not a number")
            server.orders = {"b": ("buy", "100.70", "3.0"), **dict(list(server.orders.items())[:2])}
            await server.until(2)
            await until(lambda: all(feed.books.values()))
            assert (feed.refused, feed.losses, feed.connects) == (2, 1, 2)
            assert feed.book("BTC-USD.COINBASE").bids.best() == (10_070_000_000, 300_000_000)


async def test_coinbase_full_takes_its_book_from_rest_and_again_after_a_hole(kafka_bootstrap_servers: str) -> None:
    async with CoinbaseServer().running() as server:
        exchange = Coinbase(["BTC-USD"], "full", server.url, server.rest_url)
        async with ingesting(exchange, kafka_bootstrap_servers) as feed:
            await server.until(1)
            await server.bid("100.10", "1.0")
            await until(lambda: all(feed.books.values()))
            await server.bid("100.20", "1.0")
            await until(lambda: feed.book("BTC-USD.COINBASE").bids.best() == (10_020_000_000, 100_000_000))
            await server.bid("100.30", "1.0", lost=True)
            await server.bid("100.40", "1.0")
            await until(lambda: feed.doubts == 1)
            await until(lambda: all(feed.books.values()))
            bids = feed.book("BTC-USD.COINBASE").bids
            assert [ticks for ticks, _ in bids.top(3)] == [10_040_000_000, 10_030_000_000, 10_020_000_000]
            assert (feed.losses, len(server.rest_requests)) == (0, 2)


async def test_a_recording_that_cannot_be_written_ends_and_the_feed_goes_on(
    kafka_bootstrap_servers: str, tmp_path: Path
) -> None:
    recording = Recorder(tmp_path, "KRAKEN", 0)
    (tmp_path / "KRAKEN.market.0.gz").mkdir()
    async with KrakenServer(["BTC/USD"]).running() as server:
        exchange = Kraken(["BTC/USD"], server.url)
        async with ingesting(exchange, kafka_bootstrap_servers, recording=recording) as feed:
            await server.until(3)
            await server.update("BTC/USD", "99.5", "3.00000000")
            await until(lambda: all(feed.books.values()))
    assert (recording.failed, recording.lines) == (True, 0)


async def test_the_command_ends_on_sigterm_with_its_books_closed_and_its_recording_whole(
    kafka_bootstrap_servers: str, tmp_path: Path
) -> None:
    async with KrakenServer(["BTC/USD"]).running() as server:
        argv = [
            sys.executable,
            "-m",
            "feature_cache.sources.ingest_cli",
            "--exchange",
            "kraken",
            "--instruments",
            "BTC-USD",
        ]
        argv += ["--url", server.url, "--kafka", kafka_bootstrap_servers, "--record", str(tmp_path)]
        port = free_port()
        argv += ["--metrics-port", str(port)]
        process = await asyncio.create_subprocess_exec(*argv, stderr=subprocess.PIPE, env=dict(os.environ))
        try:
            await server.until(3)
            await server.update("BTC/USD", "99.5", "3.00000000")
            while not any(event.HasField("delta") for event in await published(kafka_bootstrap_servers)):
                assert process.returncode is None
            assert await asyncio.to_thread(read, f"http://127.0.0.1:{port}/readyz") == "ok\n"
            metrics = await asyncio.to_thread(read, f"http://127.0.0.1:{port}/metrics")
            assert 'pretrade_ingest_book_valid{instrument="BTC-USD.KRAKEN"} 1.0' in metrics
            assert "pretrade_ingest_connections_lost_total 0.0" in metrics
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE_SECONDS):
                _, said = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    assert process.returncode == 0, said.decode()
    lines = said.decode().splitlines()
    assert json.loads(lines[0])["event"] == "ingest.connected"
    assert "1 of 1 books known" not in lines[-1], "they are closed"
    assert resets(await published(kafka_bootstrap_servers)) == ["start", "reconnect", "closed"]
    events = list(read_session(session_files([tmp_path])))
    assert [event.WhichOneof("event") for event in events] == ["snapshot", "delta", "reset"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def read(url: str) -> str:
    with urlopen(url, timeout=5) as answer:
        text: str = answer.read().decode()
        return text


def test_the_command_refuses_what_cannot_work() -> None:
    app = Typer()
    app.command()(ingest)
    for arguments, message in (
        (["--exchange", "kraken", "--instruments", ","], "no instruments"),
        (["--exchange", "kraken", "--instruments", "BTC-USD", "--url", "http://127.0.0.1"], "ws://"),
        (["--exchange", "binance-coinm", "--instruments", ",".join(f"S{n}" for n in range(100))], "200 streams"),
    ):
        ended = CliRunner().invoke(app, arguments)
        assert (ended.exit_code, message in ended.output) == (2, True), ended.output
