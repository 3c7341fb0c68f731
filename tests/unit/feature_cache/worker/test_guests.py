"""Computed sets as a worker sees them, with a process that says what the test wants. Real ones are in
tests/integration/test_computed_sets.py."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from redis.exceptions import RedisError
from support.guest_sets import MIXED, REGISTERED
from support.waiting import until

from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.worker import guests as module
from feature_cache.worker.engines import Engines
from feature_cache.worker.guests import Guest, Guests, SetProcess
from feature_cache.worker.set_messages import (
    Answer,
    Batch,
    Failed,
    MessageError,
    Messages,
    Progress,
    Ready,
    Vector,
    batch_of,
)

NAME = "A.SIM"
EVENTS = list(itertools.islice(simulate(1, [NAME]), 400))
READY = Ready(MIXED.fingerprint)


def row(value: float) -> Any:
    return np.array([np.nan, value, np.nan], dtype=np.float32)


class Scripted(SetProcess):
    """Says what it is told to."""

    def __init__(self) -> None:
        self.says: list[Answer | Exception] = [READY]
        self.batches: list[Batch] = []
        self.is_killed = False
        self.is_gone = True

    @property
    def has_ended(self) -> bool:
        return self.is_killed and self.is_gone

    def send(self, message: bytes) -> None:
        assert not self.is_killed
        for body in Messages().take(message):
            batch = batch_of(body)
            self.batches.append(Batch(list(batch.entries), batch.wanted))

    def receive(self) -> Iterator[Answer]:
        assert not self.is_killed
        says, self.says = self.says, []
        for answer in says:
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def kill(self) -> None:
        self.is_killed = True

    def wait(self) -> None:
        assert self.is_killed


class Bench:
    """A worker's engines with one guest, on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.launched: list[Scripted] = []
        self.refuses = False
        self.guest = Guest(REGISTERED, self.launch, lambda: self.now)
        self.guests = Guests([self.guest])
        self.engines = Engines(3, self.guests)
        self.engines.assign(0, 0, 0)
        self.offset = 0

    def launch(self) -> SetProcess:
        if self.refuses:
            raise BlockingIOError("no more processes")
        self.launched.append(Scripted())
        return self.launched[-1]

    @property
    def process(self) -> Scripted:
        return self.launched[-1]

    def feed(self, events: Iterable[Any]) -> None:
        for event in events:
            self.offset += 1
            self.engines.take(0, self.offset, event.instrument.encode(), event.SerializeToString())

    def wait(self, seconds: float) -> None:
        """Lets time pass, with exchanges in between as a worker has them."""
        for _ in range(round(seconds / 0.1)):
            self.now += 0.1
            self.guest.exchange()


def test_events_cross_as_they_are_in_the_log_and_a_vector_says_which_event_it_is_of() -> None:
    bench = Bench()
    bench.feed(EVENTS[:10])
    assert bench.guest.exchange() == []
    of_ten = bench.engines.all()[NAME].snapshot()
    bench.feed(EVENTS[10:20])
    assert bench.guest.exchange() == []
    first, second = bench.process.batches
    assert [one.event for one in first.entries] == [one.SerializeToString() for one in EVENTS[:10]]
    assert [one.begins for one in (*first.entries, *second.entries)] == [True, *[False] * 19]
    assert first.wanted == second.wanted == (0,)
    bench.process.says = [Progress(10, 1, 0.5, (Vector(1, 0, row(3)),))]
    ((engine, vector),) = bench.guest.exchange()
    assert engine is bench.engines.all()[NAME]
    assert (vector.sequence, vector.event_time_ns, vector.bid, vector.state, vector.feature_set) == (
        of_ten.sequence,
        of_ten.event_time_ns,
        of_ten.bid,
        of_ten.state,
        MIXED,
    )
    assert (bench.guest.events, bench.guest.waiting, bench.guest.vectors, bench.guest.seconds) == (10, 10, 1, 0.5)


def test_of_two_vectors_of_an_instrument_only_the_newer_one_is_given() -> None:
    bench = Bench()
    for count in (10, 20):
        bench.feed(EVENTS[count - 10 : count])
        bench.guest.exchange()
    bench.process.says = [Progress(10, 1, 0.1, (Vector(1, 0, row(3)),)), Progress(20, 2, 0.2, (Vector(2, 0, row(4)),))]
    ((_, vector),) = bench.guest.exchange()
    assert vector.values[1] == 4
    assert vector.sequence == bench.engines.all()[NAME].snapshot().sequence


def test_what_is_asked_for_is_remembered_until_it_is_answered_and_no_longer() -> None:
    bench = Bench()
    for count in (10, 20, 30):
        bench.feed(EVENTS[count - 10 : count])
        bench.guest.exchange()
    bench.process.says = [Progress(25, 0, 0.1)]
    bench.guest.exchange()
    bench.process.says = [Progress(25, 2, 0.1, (Vector(1, 0, row(3)),))]
    assert len(bench.guest.exchange()) == 1
    assert len(bench.guest._unanswered) == 1


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (Failed("raised", "KeyError()"), "raised"),
        (Failed("impossible", "flow is 2"), "impossible"),
        (Failed("whatever a guest writes into the socket", ""), "raised"),
        (EOFError(), "died"),
        (MessageError("no answer"), "died"),
        (Ready(MIXED.fingerprint + 1), "died"),
        (Progress(1, 1, 0.1, (Vector(7, 0, row(1)),)), "died"),
        (Progress(1, 1, 0.1, (Vector(1, 9, row(1)),)), "died"),
    ],
)
def test_whatever_a_process_says_that_is_no_good_suspends_the_set_for_longer_each_time(
    says: Answer | Exception, reason: Any
) -> None:
    bench = Bench()
    events = iter(EVENTS)
    for times, pause in enumerate((1.0, 2.0), 1):
        bench.feed([next(events)])
        bench.guest.exchange()
        process = bench.process
        process.says = [READY, says]
        assert bench.guest.exchange() == []
        assert (bench.guest.suspensions, process.is_killed, bench.guest.suspended) == ({reason: times}, True, True)
        dropped = bench.guest.dropped
        bench.feed([next(events)])
        assert bench.guest.dropped == dropped + 1
        bench.wait(pause - 0.2)
        assert len(bench.launched) == times
        bench.wait(0.4)
        assert len(bench.launched) == times + 1
    bench.feed([next(events)])
    bench.guest.exchange()
    ((entry,), _) = bench.process.batches[0]
    assert entry.begins, "a new process knows no instrument"


def test_a_new_process_is_not_started_before_the_last_one_is_gone() -> None:
    bench = Bench()
    bench.feed(EVENTS[:1])
    bench.guest.exchange()
    bench.process.says, bench.process.is_gone = [EOFError()], False
    bench.wait(10)
    assert (bench.guest.suspended, len(bench.launched)) == (True, 1)
    bench.process.is_gone = True
    bench.wait(0.1)
    assert (bench.guest.suspended, len(bench.launched)) == (False, 2)


def test_a_process_that_cannot_be_started_suspends_the_set_and_is_tried_again() -> None:
    bench = Bench()
    bench.refuses = True
    bench.guests.start()
    assert bench.guest.suspensions == {"died": 1}
    bench.feed(EVENTS[:1])
    bench.wait(0.9)
    bench.refuses = False
    bench.wait(0.2)
    assert (bench.guest.suspended, len(bench.launched)) == (False, 1)


def test_a_process_that_says_nothing_is_stuck_only_while_it_has_work() -> None:
    bench = Bench()
    bench.guests.start()
    bench.wait(100)
    bench.feed(EVENTS[:10])
    bench.wait(4.9)
    assert not bench.guest.suspended
    bench.process.says = [Progress(3, 0, 0.1)]
    bench.wait(4.9)
    assert not bench.guest.suspended
    bench.wait(0.3)
    assert (bench.guest.suspensions, bench.guest.events, bench.guest.dropped) == ({"stuck": 1}, 3, 7)


def test_a_worker_that_stood_still_does_not_blame_a_set() -> None:
    bench = Bench()
    bench.feed(EVENTS[:10])
    bench.guest.exchange()
    bench.now += 3600
    bench.guest.exchange()
    assert not bench.guest.suspended


def test_a_process_that_imports_for_long_is_not_stuck_and_one_that_never_begins_is() -> None:
    bench = Bench()
    bench.guests.start()
    bench.process.says = []
    bench.feed(EVENTS[:10])
    bench.wait(59)
    assert not bench.guest.suspended
    bench.wait(2)
    assert bench.guest.suspensions == {"stuck": 1}


def test_a_set_that_falls_behind_is_suspended_and_what_it_missed_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_QUEUED", 20)
    bench = Bench()
    bench.feed(EVENTS[:8])
    bench.guest.exchange()
    busy = [bench.guest.is_busy]
    bench.feed(EVENTS[8:20])
    busy.append(bench.guest.is_busy)
    assert (busy, bench.guest.suspensions) == ([False, True], {})
    bench.feed(EVENTS[20:25])
    assert (bench.guest.suspensions, bench.guest.dropped, bench.guest.waiting) == ({"behind": 1}, 25, 0)


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
    running = asyncio.create_task(bench.guests.run(cast(Any, store), lambda: held, 0.001))

    async def give(value: float) -> None:
        """Has the process give a vector for all that it was sent."""
        sent = len(bench.launched[-1].batches) if bench.launched else 0
        bench.feed(EVENTS[bench.offset : bench.offset + 10])
        await until(lambda: bool(bench.launched) and len(bench.process.batches) > sent)
        number = len(bench.process.batches)
        vectors = bench.guest.vectors
        bench.process.says = [Progress(bench.offset, number, 0.1, (Vector(number, 0, row(value)),))]
        await until(lambda: bench.guest.vectors > vectors)

    await give(1)
    held += bench.engines.all().values()
    store.fails = True
    await give(2)
    await until(lambda: bench.guests.failures == 1)
    store.fails = False
    await give(3)
    await until(lambda: bool(store.written))
    assert [one.values[1] for one in store.written] == [3]
    assert {one.feature_set for one in store.written} == {MIXED}
    assert bench.guests.written == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
