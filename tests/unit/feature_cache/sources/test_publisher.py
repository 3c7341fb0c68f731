from __future__ import annotations

import itertools

from feature_cache.engine.book import OrderBook
from feature_cache.sources.publisher import with_resets, with_snapshots
from feature_cache.sources.simulator import simulate
from pretrade.market.v1 import market_pb2 as pb


def test_a_reset_comes_before_the_first_event_of_each_instrument() -> None:
    events = list(simulate(1, duration_seconds=1))
    published = list(with_resets(events, "replay"))
    assert [event for event in published if event.WhichOneof("event") != "reset"] == events
    resets = [index for index, event in enumerate(published) if event.WhichOneof("event") == "reset"]
    assert len(resets) == 2
    for index in resets:
        reset, first = published[index], published[index + 1]
        assert reset.instrument == first.instrument
        assert (reset.event_time_ns, reset.receive_time_ns) == (first.event_time_ns, first.receive_time_ns)
        assert reset.reset.reason == "replay"
        assert not any(event.instrument == reset.instrument for event in published[:index])


def test_snapshots_of_the_book_are_added_when_the_feed_sends_none() -> None:
    events = list(simulate(1, ["BTCUSDT.SIM"], duration_seconds=35))
    only_first = [event for index, event in enumerate(events) if index == 0 or event.WhichOneof("event") != "snapshot"]
    published = list(with_snapshots(only_first))
    added = [event for event in published if event.WhichOneof("event") == "snapshot"][1:]
    assert [event for event in published if event not in added] == only_first
    assert len(added) == 3
    times = [event.event_time_ns for event in published if event.WhichOneof("event") == "snapshot"]
    assert all(10 <= (later - earlier) / 1e9 < 10.2 for earlier, later in itertools.pairwise(times))
    books = OrderBook(), OrderBook()
    books[0].apply_snapshot(added[-1].snapshot)
    for event in published:
        if event.WhichOneof("event") == "snapshot":
            books[1].apply_snapshot(event.snapshot)
        elif event.WhichOneof("event") == "delta":
            books[1].apply_delta(event.delta)
            if event.delta.last_update_id > added[-1].snapshot.last_update_id:
                books[0].apply_delta(event.delta)
    assert books[0].bids.top(999) == books[1].bids.top(999)
    assert books[0].asks.top(999) == books[1].asks.top(999)


def test_no_snapshot_is_made_of_a_book_that_is_not_known() -> None:
    events = list(simulate(1, ["BTCUSDT.SIM"], duration_seconds=15))
    without_first = events[1:]
    before = [event for event in without_first if event.event_time_ns < events[0].event_time_ns + 9 * 10**9]
    assert not any(event.WhichOneof("event") == "snapshot" for event in with_snapshots(before))
    reset = pb.MarketEvent(instrument="BTCUSDT.SIM", reset=pb.BookReset(reason="reconnect"))
    after_reset = [events[0], reset, *(event for event in events[1:] if event.WhichOneof("event") != "snapshot")]
    assert sum(event.WhichOneof("event") == "snapshot" for event in with_snapshots(after_reset)) == 1
