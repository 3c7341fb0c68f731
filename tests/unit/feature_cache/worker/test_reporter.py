"""When a feature worker is ready."""

from __future__ import annotations

import pytest

from feature_cache.store.vectors import FeatureStore, connect
from feature_cache.worker.consumer import DeadLetters, MarketEventConsumer
from feature_cache.worker.engines import Engines
from feature_cache.worker.reporter import Reporter
from feature_cache.worker.settings import WorkerSettings
from pretrade.market.v1 import market_pb2 as pb

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND


class Worker:
    """What a worker's readiness is made of, with a clock that tests move; nothing is connected."""

    def __init__(self) -> None:
        settings = WorkerSettings(ready_age_seconds=60.0, ready_lag_records=100)
        self.now_ns = START
        self.engines = Engines(settings.max_instruments)
        self.engines.assign(0, 0, 0)
        self.consumer = MarketEventConsumer(settings, self.engines, DeadLetters("127.0.0.1:1", "dlq"))
        self.consumer.lag = {0: 0}
        store = FeatureStore(connect("redis://127.0.0.1:1", 1.0), 1.0, 1.0)
        self.reporter = Reporter(store, self.engines, self.consumer, settings, lambda: self.now_ns)

    def hear(self, instrument: str, seconds: float, **body: pb.BookSnapshot | pb.BookReset) -> None:
        time_ns = START + round(seconds * SECOND)
        times = {"event_time_ns": time_ns, "receive_time_ns": time_ns, "publish_time_ns": time_ns}
        one = pb.MarketEvent(instrument=instrument, **times, **body)  # type: ignore[arg-type]  # one of the oneof
        position = self.engines.positions()[0]
        self.engines.take(0, position, instrument.encode(), one.SerializeToString())

    def book(self, instrument: str, seconds: float) -> None:
        levels = {"bid_ticks": [99], "bid_lots": [1], "ask_ticks": [101], "ask_lots": [1]}
        self.hear(instrument, seconds, snapshot=pb.BookSnapshot(last_update_id=1 + round(seconds), **levels))

    def problem_after(self, seconds: float) -> str | None:
        self.now_ns = START + round(seconds * SECOND)
        return self.reporter.problem


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_a_worker_without_instruments_is_ready(worker: Worker) -> None:
    assert worker.problem_after(1000) is None


def test_a_venue_that_is_silent_for_too_long_is_named(worker: Worker) -> None:
    worker.book("BTC.SIM", 0)
    worker.book("ETH.OTHER", 50)
    assert worker.problem_after(60) is None
    assert worker.problem_after(61) == "newest event of SIM is 61 s old"
    assert worker.problem_after(200) == "newest event of SIM is 200 s old"
    worker.book("BTC.SIM", 199)
    assert worker.problem_after(200) == "newest event of OTHER is 150 s old"


def test_an_instrument_that_trades_rarely_does_not_make_its_venue_silent(worker: Worker) -> None:
    worker.book("RARE.SIM", 0)
    worker.book("BTC.SIM", 500)
    assert worker.problem_after(501) is None


def test_a_feed_that_was_stopped_on_purpose_may_be_silent(worker: Worker) -> None:
    worker.book("BTC.SIM", 0)
    worker.hear("BTC.SIM", 1, reset=pb.BookReset(reason="closed"))
    assert worker.problem_after(500) is None


def test_lag_and_unknown_books_are_named_first(worker: Worker) -> None:
    worker.book("BTC.SIM", 0)
    worker.hear("ETH.SIM", 1, reset=pb.BookReset(reason="reconnect"))
    assert worker.problem_after(500) == "book unknown: ETH.SIM (reconnect)"
    worker.consumer.lag = {0: 101}
    assert worker.problem_after(500) == "101 records behind"
    worker.consumer.lag = {}
    assert worker.problem_after(500) == "lag not known yet"
