"""What is counted of the time that events take."""

from __future__ import annotations

import pytest

from feature_cache.worker import delays as delays_module
from feature_cache.worker.delays import EDGES_SECONDS, DelayHistogram, Delays

MS = 1_000_000
NOW_NS = 1_700_000_000_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ns = NOW_NS

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def delays(clock: Clock) -> Delays:
    return Delays(clock)


def buckets(histogram: DelayHistogram) -> dict[float, int]:
    """The counts that are not 0, by upper edge."""
    return {edge: int(count) for edge, count in zip((*EDGES_SECONDS, -1.0), histogram.counts, strict=True) if count}


def test_an_event_is_counted_when_read_and_again_when_written(delays: Delays, clock: Clock) -> None:
    delays.add(NOW_NS - 1 * MS)
    delays.add(NOW_NS - 3 * MS)
    delays.all_read()
    assert buckets(delays.read) == {0.001: 1, 0.003: 1}, "a delay at an edge counts below it"
    assert delays.read.sum_seconds == pytest.approx(0.004)
    taken = delays.take_unwritten()
    clock.now_ns += 2 * MS
    delays.all_written(taken)
    assert buckets(delays.written) == {0.003: 1, 0.005: 1}
    delays.all_written(delays.take_unwritten())
    assert sum(buckets(delays.written).values()) == 2, "nothing twice"


def test_events_that_come_during_a_write_belong_to_the_next(delays: Delays) -> None:
    delays.add(NOW_NS)
    taken = delays.take_unwritten()
    delays.add(NOW_NS)
    delays.all_read()
    delays.all_written(taken)
    assert buckets(delays.written) == {0.001: 1}
    delays.all_written(delays.take_unwritten())
    assert buckets(delays.written) == {0.001: 2}


def test_events_of_a_write_that_failed_are_counted_once_it_has_succeeded(delays: Delays, clock: Clock) -> None:
    delays.add(NOW_NS)
    delays.put_back(delays.take_unwritten())
    delays.add(NOW_NS)
    clock.now_ns += 20_000 * MS
    delays.all_written(delays.take_unwritten())
    assert buckets(delays.written) == {-1.0: 2}


def test_a_publisher_whose_clock_is_ahead_has_no_negative_delays(delays: Delays) -> None:
    delays.add(NOW_NS + 5 * MS)
    delays.all_read()
    assert buckets(delays.read) == {0.001: 1}
    assert delays.read.sum_seconds == 0


def test_an_outage_of_redis_does_not_fill_the_memory(delays: Delays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delays_module, "_MOST", 10)
    for _ in range(50):
        delays.add(NOW_NS)
        delays.put_back(delays.take_unwritten())
    assert len(delays.take_unwritten()) == 10
    assert buckets(delays.read) == {0.001: 50}
