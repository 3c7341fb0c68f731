"""What a feed does wrong, through the real worker: an unknown book until a fresh snapshot, and everybody is told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.exchange_servers import KrakenServer
from support.followed_cache import following
from support.waiting import until

from feature_cache.engine.book import OrderBook
from feature_cache.sources.exchanges import Kraken
from feature_cache.sources.ingest import Ingest, IngestSettings
from feature_cache.sources.publisher import EventPublisher
from feature_cache.sources.simulator import simulate
from feature_cache.store.cluster import open_store
from feature_cache.store.codec import BookState
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from feature_cache.store.report import InstrumentReport, ReportReader
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.market.v1 import market_pb2 as pb

pytestmark = pytest.mark.stack

Seen = Callable[[str], None]
BTC = "BTC-USD.KRAKEN"
SECOND = 1_000_000_000


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    settings = LocalSettings(dir=tmp_path_factory.mktemp("feed"), market=False)
    with pytest.MonkeyPatch.context() as environment:
        # A machine that is slow must not make a venue silent while a test waits.
        environment.setenv("PRETRADE_WORKER_READY_AGE_SECONDS", "3600")
        with Stack(settings, parts={"valkey", "broker", "worker"}) as stack:
            yield stack


@dataclass
class Instrument:
    """One instrument as its feed, the worker and a decision server's copy see it."""

    stack: Stack
    name: str
    cache: FeatureCache
    reports: ReportReader
    publisher: EventPublisher

    async def publish(self, events: Iterable[pb.MarketEvent]) -> None:
        await self.publisher.publish(events, speed=None)

    @property
    def state(self) -> BookState | None:
        entry = self.cache.get(self.name)
        return None if entry is None else entry.snapshot.state

    async def until_state(self, state: BookState) -> float:
        """Waits until a server's copy shows it; returns the seconds that took."""
        began = time.monotonic()
        await until(lambda: self.state is state)
        return time.monotonic() - began

    async def until_reported(self, reason: str) -> InstrumentReport:
        """Waits until the report gives that reason, and no lag; the readiness of the worker must give it too."""
        while True:
            report = (await self.reports.read([self.name])).get(self.name)
            # The lag in it is up to a second old.
            if report is not None and report.unknown_because == reason and report.lag_records == 0:
                return report
            await asyncio.sleep(0.05)

    async def get(self, path: str) -> tuple[int, str]:
        return await asyncio.to_thread(get, f"{self.stack.endpoints.worker_url}{path}")

    async def count(self, metric: str) -> float:
        _, text = await self.get("/metrics")
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        labels = {"instrument": self.name}
        return sum(sample.value for sample in samples if sample.name == f"{metric}_total" and sample.labels == labels)

    def logged(self, event: str) -> list[str]:
        """The reasons with which the worker logged something of this instrument."""
        lines = self.stack["worker"].log_path.read_text().splitlines()
        entries = [json.loads(line) for line in lines if event in line]
        return [entry.get("reason", "") for entry in entries if entry.get("instrument") == self.name]


def get(url: str) -> tuple[int, str]:
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture
async def instrument(stack: Stack, request: pytest.FixtureRequest) -> AsyncIterator[Instrument]:
    redis_url, kafka = stack.endpoints.redis_url, stack.endpoints.kafka_bootstrap_servers
    assert redis_url is not None
    assert kafka is not None
    settings = FeatureCacheSettings(ttl_seconds=600, reconcile_interval_seconds=0.2)
    name: str = request.param
    async with (
        following(FeatureCache(redis_url, settings, [name])) as cache,
        open_store(redis_url, 600.0, 1.0) as store,
        EventPublisher(kafka) as publisher,
    ):
        await until(lambda: cache.connected)
        found = Instrument(stack, name, cache, ReportReader(store), publisher)
        yield found
        # The next test's readiness must not be this one's.
        leave = pb.MarketEvent(instrument=name, event_time_ns=1, receive_time_ns=1)
        leave.reset.reason = "closed"
        await publisher.publish([leave], speed=None)
        async with asyncio.timeout(30):
            await found.until_reported("closed")


def market(name: str, seconds: float) -> list[pb.MarketEvent]:
    """Simulated events after their first snapshot, which is the only one."""
    first, *events = simulate(1, [name], duration_seconds=seconds)
    return [first, *(event for event in events if not event.HasField("snapshot"))]


def fresh_snapshot(events: Iterable[pb.MarketEvent]) -> pb.MarketEvent:
    """What the exchange would send now: the book after all of the events."""
    book, last = OrderBook(), pb.MarketEvent()
    for event in events:
        if event.HasField("snapshot"):
            book.apply_snapshot(event.snapshot)
        elif event.HasField("delta"):
            book.apply_delta(event.delta)
        last = event
    fresh = pb.MarketEvent()
    fresh.CopyFrom(last)
    fresh.snapshot.CopyFrom(book.to_snapshot())
    return fresh


async def unknown_until_a_fresh_snapshot(
    instrument: Instrument,
    seen: Seen,
    *,
    good: list[pb.MarketEvent],
    fault: list[pb.MarketEvent],
    after: list[pb.MarketEvent],
    fresh: pb.MarketEvent,
    reason: str,
    metric: str,
) -> None:
    """The clauses, one by one: unknown, counted, logged once, visible, not ready; then known again."""
    await instrument.publish(good)
    await instrument.until_state(BookState.VALID)
    await instrument.publish(fault)
    seconds = await instrument.until_state(BookState.UNKNOWN)
    entry = instrument.cache.get(instrument.name)
    assert entry is not None
    assert np.isnan(entry.snapshot.values).all()
    async with asyncio.timeout(30):
        report = await instrument.until_reported(reason)
    assert report.state is BookState.UNKNOWN
    assert report.losses == 1
    status, text = await instrument.get("/readyz")
    assert (status, f"{instrument.name} ({reason})" in text) == (503, True), text
    assert (await instrument.get("/healthz"))[0] == 200
    await instrument.publish(after)
    assert await instrument.count(metric) == 1
    assert instrument.state is BookState.UNKNOWN, "updates alone make nothing known"
    await instrument.publish([fresh])
    await instrument.until_state(BookState.VALID)
    async with asyncio.timeout(30):
        await instrument.until_reported("")
    assert (await instrument.get("/readyz"))[0] == 200
    assert instrument.logged("worker.book_unknown") == [reason]
    seen(f"unknown after {1000 * seconds:.0f} ms, reason '{reason}', 1 counted, 1 log line, not ready; then valid")


@pytest.mark.fault(
    "C4",
    "A market update is lost",
    "The book is unknown until a fresh snapshot: counted, logged once and shown in the status. Orders get ABSTAIN.",
)
@pytest.mark.parametrize("instrument", ["GAP.SIM"], indirect=True)
async def test_a_gap_makes_the_book_unknown(instrument: Instrument, seen: Seen) -> None:
    events = market("GAP.SIM", 3)
    deltas = [number for number, event in enumerate(events) if event.HasField("delta")]
    lost, half = deltas[10], deltas[20]
    await unknown_until_a_fresh_snapshot(
        instrument,
        seen,
        good=events[:lost],
        fault=events[lost + 1 : half],
        after=events[half:],
        fresh=fresh_snapshot(events),
        reason="gap",
        metric="pretrade_worker_book_gaps",
    )


@pytest.mark.fault("C4", "The feed reports that it lost continuity", "The book is unknown until a fresh snapshot.")
@pytest.mark.parametrize("instrument", ["RESET.SIM"], indirect=True)
async def test_a_reset_makes_the_book_unknown(instrument: Instrument, seen: Seen) -> None:
    events = market("RESET.SIM", 3)
    half = len(events) // 2
    reset = pb.MarketEvent(
        instrument="RESET.SIM",
        event_time_ns=events[half].event_time_ns,
        receive_time_ns=events[half].receive_time_ns,
        reset=pb.BookReset(reason="reconnect"),
    )
    await unknown_until_a_fresh_snapshot(
        instrument,
        seen,
        good=events[:half],
        fault=[reset],
        after=events[half:],
        fresh=fresh_snapshot(events),
        reason="reconnect",
        metric="pretrade_worker_feed_resets",
    )


@pytest.mark.fault(
    "C4", "An update crosses the book (best bid at or above best ask)", "The book is unknown until a fresh snapshot."
)
@pytest.mark.parametrize("instrument", ["CROSSED.SIM"], indirect=True)
async def test_a_crossed_book_is_unknown(instrument: Instrument, seen: Seen) -> None:
    events = market("CROSSED.SIM", 3)
    last = max(number for number, event in enumerate(events[: len(events) // 2]) if event.HasField("delta"))
    good = events[: last + 1]
    fresh = fresh_snapshot(good)
    crossing = pb.MarketEvent()
    crossing.CopyFrom(events[last])
    update_id = events[last].delta.last_update_id + 1
    crossing.delta.CopyFrom(
        pb.BookDelta(
            first_update_id=update_id,
            last_update_id=update_id,
            bid_ticks=[max(fresh.snapshot.ask_ticks)],
            bid_lots=[1],
        )
    )
    fresh.snapshot.last_update_id = update_id + 1
    await unknown_until_a_fresh_snapshot(
        instrument,
        seen,
        good=good,
        fault=[crossing],
        after=[],
        fresh=fresh,
        reason="crossed",
        metric="pretrade_worker_book_crossings",
    )


@pytest.mark.fault(
    "C4",
    "Event time runs back by a minute",
    "The book is unknown until a fresh snapshot, and the time windows start again.",
)
@pytest.mark.parametrize("instrument", ["BACK.SIM"], indirect=True)
async def test_time_that_runs_back_makes_the_book_unknown(instrument: Instrument, seen: Seen) -> None:
    events = market("BACK.SIM", 3)
    deltas = [number for number, event in enumerate(events) if event.HasField("delta")]
    back = deltas[15]
    for event in events[back:]:
        event.event_time_ns -= 60 * SECOND
        event.receive_time_ns -= 60 * SECOND
    await unknown_until_a_fresh_snapshot(
        instrument,
        seen,
        good=events[:back],
        fault=events[back : back + 5],
        after=events[back + 5 :],
        fresh=fresh_snapshot(events),
        reason="time ran back",
        metric="pretrade_worker_time_restarts",
    )


@pytest.mark.fault(
    "C4", "A live feed's checksum does not match", "The book is unknown, and the feed fetches a fresh snapshot."
)
@pytest.mark.parametrize("instrument", [BTC], indirect=True)
async def test_a_failed_checksum_makes_the_book_unknown_until_the_feed_has_a_fresh_one(
    instrument: Instrument, seen: Seen
) -> None:
    settings = IngestSettings(resync_min_seconds=3.0)
    async with KrakenServer(["BTC/USD"]).running() as server:
        feed = Ingest(Kraken(["BTC/USD"], server.url), instrument.publisher, settings)
        task = asyncio.create_task(feed.run())
        try:
            await server.until(3)
            await server.update("BTC/USD", "99.5", "3.00000000")
            await instrument.until_state(BookState.VALID)
            server.answer_subscriptions = False
            await server.update("BTC/USD", "99.4", "5.00000000", wrong=True)
            seconds = await instrument.until_state(BookState.UNKNOWN)
            async with asyncio.timeout(30):
                report = await instrument.until_reported("checksum")
            assert "BTC-USD.KRAKEN (checksum)" in (await instrument.get("/readyz"))[1]
            server.answer_subscriptions = True
            await instrument.until_state(BookState.VALID)
            assert instrument.logged("worker.book_unknown") == ["checksum"]
            seen(
                f"unknown after {1000 * seconds:.0f} ms, reason '{report.unknown_because}', 1 log line, not ready; "
                f"valid again after {feed.requests} requests"
            )
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.mark.fault(
    "C4",
    "An event carries a time one hour in the future",
    "It counts as at most one second ahead. The book stays valid.",
)
@pytest.mark.parametrize("instrument", ["AHEAD.SIM"], indirect=True)
async def test_an_event_from_the_future_is_clamped(instrument: Instrument, seen: Seen) -> None:
    events = market("AHEAD.SIM", 3)
    ahead = max(number for number, event in enumerate(events[: len(events) // 2]) if event.HasField("trade"))
    events[ahead].event_time_ns += 3600 * SECOND
    await instrument.publish(events)
    last = events[-1].event_time_ns
    await until(lambda: instrument.state is BookState.VALID and newest(instrument) >= last)
    assert newest(instrument) <= last + SECOND
    assert await instrument.count("pretrade_worker_future_events") == 1
    assert await instrument.count("pretrade_worker_time_restarts") == 0
    seen(f"1 counted, newest event {(newest(instrument) - last) / 1e9:.2f} s ahead of the feed, book valid")


@pytest.mark.fault(
    "C4",
    "The feed repeats updates or sends old ones",
    "They are dropped and counted. The book is the same as without them.",
)
@pytest.mark.parametrize("instrument", ["TWICE.SIM"], indirect=True)
async def test_duplicates_and_older_events_are_dropped(instrument: Instrument, seen: Seen) -> None:
    events = market("TWICE.SIM", 3)
    again = [event for number, event in enumerate(events) for event in (event, events[max(1, number - 5)])]
    await instrument.publish(again)
    last = events[-1].event_time_ns
    await until(lambda: instrument.state is BookState.VALID and newest(instrument) == last)
    stale = await instrument.count("pretrade_worker_stale_events")
    assert stale >= len(events) - 1
    assert await instrument.count("pretrade_worker_book_gaps") == 0
    seen(f"{stale:.0f} of {len(again)} events dropped and counted, 0 gaps, book valid")


@pytest.mark.fault(
    "C4",
    "A feed is stopped on purpose",
    "The book is known to be closed: orders get ABSTAIN, but the worker stays ready.",
)
@pytest.mark.parametrize("instrument", ["CLOSED.SIM"], indirect=True)
async def test_a_closed_feed_is_no_reason_not_to_be_ready(instrument: Instrument, seen: Seen) -> None:
    events = market("CLOSED.SIM", 1)
    await instrument.publish(events)
    await instrument.until_state(BookState.VALID)
    closing = fresh_snapshot(events)
    closing.reset.reason = "closed"
    await instrument.publish([closing])
    await instrument.until_state(BookState.UNKNOWN)
    async with asyncio.timeout(30):
        await instrument.until_reported("closed")
    assert await instrument.get("/readyz") == (200, "ok\n")
    seen("reason 'closed', /readyz 200")


def newest(instrument: Instrument) -> int:
    entry = instrument.cache.get(instrument.name)
    return 0 if entry is None else entry.snapshot.event_time_ns
