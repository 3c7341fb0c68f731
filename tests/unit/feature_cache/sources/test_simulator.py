from __future__ import annotations

import itertools

import numpy as np
import pytest

from feature_cache.engine.book import OrderBook
from feature_cache.engine.engine import FeatureEngine
from feature_cache.features import HIGHEST, INDEX, LOWEST, NAMES
from feature_cache.sources.simulator import INSTRUMENTS, START_NS, simulate
from pretrade.market.v1 import market_pb2 as pb


def test_the_same_seed_gives_the_same_market() -> None:
    def run(seed: int) -> list[bytes]:
        return [event.SerializeToString(deterministic=True) for event in simulate(seed, duration_seconds=2)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_an_instrument_does_not_depend_on_the_others() -> None:
    alone = list(simulate(1, ["ETHUSDT.SIM"], duration_seconds=2))
    together = [event for event in simulate(1, duration_seconds=2) if event.instrument == "ETHUSDT.SIM"]
    assert alone == together


def test_every_update_id_is_accounted_for_and_quotes_are_the_top_of_the_book() -> None:
    for name in INSTRUMENTS:
        book, shared = OrderBook(), 0
        quote = pb.Quote()
        for event in simulate(5, [name], duration_seconds=30):
            kind = event.WhichOneof("event")
            if kind == "snapshot":
                if book.valid:
                    before = [book.bids.top(999), book.asks.top(999)]
                    assert book.apply_snapshot(event.snapshot)
                    assert [book.bids.top(999), book.asks.top(999)] == before
                book.apply_snapshot(event.snapshot)
            elif kind == "delta":
                assert book.apply_delta(event.delta)
                if quote.update_id == book.last_update_id:
                    shared += 1
                    top = (quote.bid_ticks, quote.bid_lots), (quote.ask_ticks, quote.ask_lots)
                    assert (book.bids.best(), book.asks.best()) == top
            elif kind == "quote":
                assert event.quote.update_id > quote.update_id
                assert event.quote.bid_ticks < event.quote.ask_ticks
                quote = event.quote
        assert shared > 10
        assert (book.gaps, book.crossings, book.stale) == (0, 0, 0)
        assert len(book.bids) >= 20


def test_a_snapshot_is_sent_at_the_start_and_every_ten_seconds() -> None:
    events = list(simulate(1, ["BTCUSDT.SIM"], duration_seconds=25))
    snapshots = [event.event_time_ns for event in events if event.WhichOneof("event") == "snapshot"]
    assert events[0].WhichOneof("event") == "snapshot"
    assert [(time - START_NS) / 1e9 for time in snapshots] == [0.0, 10.0, 20.0]


def test_events_come_in_the_order_of_receipt_and_after_they_happened() -> None:
    events = list(simulate(2, duration_seconds=5, start_ns=10**18))
    assert [event.receive_time_ns for event in events] == sorted(event.receive_time_ns for event in events)
    assert all(0 < event.receive_time_ns - event.event_time_ns < 100_000_000 for event in events)
    assert all(10**18 <= event.event_time_ns <= 10**18 + 5 * 10**9 for event in events)


def test_a_market_without_an_end_goes_on() -> None:
    events = itertools.islice(simulate(1), 5_000)
    assert len({event.instrument for event in events}) == len(INSTRUMENTS)


def test_the_features_know_something_about_the_next_move() -> None:
    for name in INSTRUMENTS:
        engine = FeatureEngine(name)
        times, mids, imbalances = [], [], []
        next_ns = START_NS
        for event in simulate(11, [name], duration_seconds=240):
            engine.on_event(event)
            if event.event_time_ns >= next_ns:
                found = engine.snapshot()
                possible = (found.values >= LOWEST) & (found.values <= HIGHEST) | np.isnan(found.values)
                assert possible.all(), [NAMES[i] for i in np.flatnonzero(~possible)]
                times.append(found.event_time_ns)
                mids.append(found.mid)
                imbalances.append(found.values[INDEX["imbalance_l1"]])
                next_ns = event.event_time_ns + 250_000_000
        later = np.searchsorted(times, np.array(times) + 5 * 10**9)
        usable = np.flatnonzero(later < len(times))
        moves = np.log(np.array(mids)[later[usable]] / np.array(mids)[usable])
        assert np.corrcoef(np.array(imbalances)[usable], moves)[0, 1] > 0.1
        assert 0.3 < 1e4 * moves.std() < 10, "basis points in five seconds, like a real market"


def test_only_the_venue_of_simulations_can_be_simulated() -> None:
    with pytest.raises(ValueError, match=r"SYMBOL\.SIM"):
        simulate(1, ["BTCUSDT.BINANCE"])
