"""Computed sets beside the engine: what they see, what they give, and what becomes of one that misbehaves."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from redis.exceptions import RedisError
from support.guest_sets import MIXED, Trades
from support.waiting import until

from feature_cache.feature_sets import Computer, Registered
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.worker import guests as module
from feature_cache.worker.engines import Engines
from feature_cache.worker.guests import Guest, Guests
from pretrade.market.v1 import market_pb2 as pb

NAME = "A.SIM"
EVENTS = list(itertools.islice(simulate(1, [NAME]), 400))
TRADES = sum(event.WhichOneof("event") == "trade" for event in EVENTS)
HANG = threading.Event()


class Raises(Trades):
    def on_event(self, event: pb.MarketEvent) -> None:
        raise SystemExit("a guest must not end the worker")


class Hangs(Trades):
    def on_event(self, event: pb.MarketEvent) -> None:
        HANG.wait(60)


class Negative(Trades):
    def values(self) -> NDArray[np.float32]:
        return np.array([-1.0], dtype=np.float32)


class Infinite(Trades):
    def values(self) -> NDArray[np.float32]:
        return np.array([np.inf], dtype=np.float32)


class TooMany(Trades):
    def values(self) -> NDArray[np.float32]:
        return np.zeros(len(MIXED), dtype=np.float32)


class Bench:
    """A worker's engines with one guest, on a clock that the test moves."""

    def __init__(self, make: Callable[[str], Computer] = Trades) -> None:
        self.now = 0.0
        self.guest = Guest(Registered(MIXED, make, "the tests"), lambda: self.now)
        self.guests = Guests([self.guest])
        self.engines = Engines(3, self.guests)
        self.engines.assign(0, 0, 0)
        self.offset = 0
        self.ready: list[FeatureSnapshot] = []

    def feed(self, events: Iterable[pb.MarketEvent]) -> None:
        for event in events:
            self.offset += 1
            self.engines.take(0, self.offset, event.instrument.encode(), event.SerializeToString())

    def has_ready(self) -> bool:
        self.ready += [snapshot for _, snapshot in self.guest.take_ready()]
        return bool(self.ready)


@pytest.fixture(autouse=True)
def hang() -> Iterator[None]:
    HANG.clear()
    yield
    HANG.set()


async def test_a_guest_sees_every_event_and_its_vector_says_which_it_is_of() -> None:
    assert TRADES > 10
    bench = Bench()
    bench.feed(EVENTS)
    (of_mf1,) = bench.engines.take_changed()
    await until(lambda: bench.has_ready() and bench.ready[-1].sequence == of_mf1.sequence)
    newest = bench.ready[-1]
    assert newest.values[1] == TRADES
    assert (newest.feature_set, newest.sequence, newest.event_time_ns, newest.bid, newest.state) == (
        MIXED,
        of_mf1.sequence,
        of_mf1.event_time_ns,
        of_mf1.bid,
        of_mf1.state,
    )
    assert np.isnan(newest.values).tolist() == [True, False, True], "features from elsewhere are not its own to give"
    assert bench.guest.events == len(EVENTS)
    assert bench.guest.seconds > 0


async def test_stale_and_refused_events_are_not_shown() -> None:
    bench = Bench()
    bench.feed(EVENTS[:50])
    with pytest.raises(ValueError, match="contract"):
        bench.feed([pb.MarketEvent(instrument=NAME)])
    bench.feed(event for event in EVENTS[:50] if event.WhichOneof("event") == "trade")
    bench.feed(EVENTS[50:])
    await until(lambda: bench.has_ready() and bench.ready[-1].values[1] >= TRADES)
    assert bench.ready[-1].values[1] == TRADES


async def test_what_is_read_again_fills_a_guest_and_is_published_from_the_end_of_the_log_on() -> None:
    bench = Bench()
    bench.engines.assign(0, 0, live_from=len(EVENTS) + 1)
    bench.feed(EVENTS[:-1])
    await until(lambda: bench.guest.events == len(EVENTS) - 1)
    assert not bench.has_ready()
    bench.feed(EVENTS[-1:])
    await until(bench.has_ready)
    await until(lambda: bench.has_ready() and bench.ready[-1].values[1] == TRADES)


async def test_history_is_held_back_while_a_guest_has_enough_of_it_and_what_is_live_never_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MOST_QUEUED", 40)
    bench = Bench(Hangs)
    bench.engines.assign(0, 0, live_from=len(EVENTS))
    bench.engines.assign(1, 0, live_from=0)
    bench.feed(EVENTS[:1])
    await until(lambda: bench.guest._busy_since is not None)
    bench.feed(EVENTS[1:21])
    assert not bench.engines.held_back
    bench.feed(EVENTS[21:22])
    assert bench.engines.held_back == {0}
    HANG.set()
    await until(lambda: not bench.engines.held_back)


async def test_an_instrument_that_begins_again_gets_a_new_computer() -> None:
    bench = Bench()
    bench.feed(EVENTS)
    await until(lambda: bench.guest.events == len(EVENTS))
    bench.engines.begin_again(0, 0, 0)
    bench.offset = 0
    bench.feed(EVENTS)
    await until(lambda: bench.guest.events == 2 * len(EVENTS))
    await until(lambda: bench.has_ready() and bench.ready[-1].values[1] == TRADES)


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Raises, "raised"), (Negative, "impossible"), (Infinite, "impossible"), (TooMany, "impossible")],
)
async def test_a_guest_that_misbehaves_is_suspended_for_longer_each_time_and_mf1_goes_on(
    make: Callable[[str], Computer], reason: Any
) -> None:
    bench = Bench(make)
    events = iter(EVENTS)
    for times, pause in enumerate((1.0, 2.0), 1):
        bench.feed([next(events)])
        await until(lambda: not bench.has_ready() and bench.guest.suspended)
        assert bench.guest.suspensions == {reason: times}
        assert len(bench.engines.take_changed()) == 1
        bench.feed([next(events)])
        assert bench.guest.dropped == times
        bench.now += pause - 0.01
        bench.feed([next(events)])
        assert bench.guest.suspended
        bench.guest.dropped = times
        bench.now += 0.01


async def test_a_guest_that_does_not_return_delays_nobody_and_begins_again_when_it_has() -> None:
    bench = Bench(Hangs)
    bench.feed(EVENTS[:10])
    assert bench.engines.take_changed()
    await until(lambda: bench.guest._busy_since is not None)
    bench.now += module._LONGEST_CALL_SECONDS + 0.1
    assert not bench.has_ready()
    assert (bench.guest.suspended, bench.guest.suspensions) == (True, {"stuck": 1})
    bench.now += 1000.0
    bench.feed(EVENTS[10:11])
    assert bench.guest.suspended, "one thread of a set hangs at most"
    HANG.set()
    more = iter(EVENTS[11:])

    def goes_on() -> bool:
        bench.feed([next(more)])
        return not bench.guest.suspended

    await until(goes_on)
    await until(bench.has_ready)


async def test_a_guest_that_takes_long_to_import_is_not_taken_for_stuck_and_misses_nothing() -> None:
    def make(instrument: str) -> Computer:
        if instrument == module._TRIAL:
            HANG.wait(60)  # as an import of seconds
        return Trades(instrument)

    bench = Bench(make)
    bench.guests.start()
    bench.feed(EVENTS[:10])
    bench.now += 2 * module._LONGEST_CALL_SECONDS
    assert not bench.has_ready()
    bench.feed(EVENTS[10:])
    HANG.set()
    await until(lambda: bench.has_ready() and bench.ready[-1].values[1] == TRADES)
    assert not bench.guest.suspensions


async def test_a_guest_whose_first_computer_cannot_be_made_goes_on_with_the_next() -> None:
    def make(instrument: str) -> Computer:
        if instrument == module._TRIAL:
            raise KeyError(instrument)
        return Trades(instrument)

    bench = Bench(make)
    bench.guests.start()
    bench.feed(EVENTS)
    await until(lambda: bench.has_ready() and bench.ready[-1].values[1] == TRADES)


async def test_a_guest_that_falls_behind_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_QUEUED", 20)
    bench = Bench(Hangs)
    bench.feed(EVENTS[:1])
    await until(lambda: bench.guest._busy_since is not None)
    bench.feed(EVENTS[1:30])
    assert bench.guest.suspensions == {"behind": 1}
    assert bench.guest.dropped == 9


class Store:
    def __init__(self) -> None:
        self.written: list[FeatureSnapshot] = []
        self.fails = False

    async def write(self, snapshots: Iterable[FeatureSnapshot]) -> int:
        if self.fails:
            raise RedisError("no")
        self.written += snapshots
        return 0


async def test_vectors_are_written_for_the_instruments_that_the_worker_holds() -> None:
    bench, store = Bench(), Store()
    held: list[Any] = []
    writing = asyncio.create_task(bench.guests.keep_writing(cast(Any, store), lambda: held, 0.001))
    bench.feed(EVENTS[:100])
    await until(lambda: bench.guest.vectors > 0)
    held += bench.engines.all().values()
    store.fails = True
    bench.feed(EVENTS[100:200])
    await until(lambda: bench.guests.failures > 0)
    store.fails = False
    bench.feed(EVENTS[200:])
    await until(lambda: bool(store.written) and store.written[-1].values[1] == TRADES)
    assert {snapshot.feature_set for snapshot in store.written} == {MIXED}
    assert bench.guests.written == len(store.written)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)


def test_while_guests_run_the_event_loop_gets_the_interpreter_back_within_half_a_millisecond() -> None:
    before = sys.getswitchinterval()
    bench = Bench()
    bench.guests.start()
    try:
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    finally:
        bench.guests.close()
    assert sys.getswitchinterval() == before
