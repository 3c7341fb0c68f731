"""Computed sets in their processes, beside the engines of a worker: what they see and give, and what becomes of one
that misbehaves. Nothing here depends on how fast the machine is: `mf1` has done all its work while a set does something
that never ends.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
from asyncio.subprocess import PIPE
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import odd_sets
from support.waiting import until

from feature_cache import feature_sets
from feature_cache.feature_sets import Registered
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.worker import guests as module
from feature_cache.worker.engines import Engines
from feature_cache.worker.guests import Guest, Guests, launcher
from pretrade.market.v1 import market_pb2 as pb

NAME = "A.SIM"
EVENTS = list(itertools.islice(simulate(1, [NAME]), 400))
TRADES = sum(event.WhichOneof("event") == "trade" for event in EVENTS)
FILE = Path(odd_sets.__file__)
SOURCE = FILE.read_text()


class Bench:
    """A worker's engines with some sets, on a clock that the test moves."""

    def __init__(self, *names: str, file: Path = FILE) -> None:
        self.now = 0.0
        known = {one.feature_set.id: one for one in feature_sets.of_file(file)}
        self.all = [Guest(known[name], launcher(known[name], file), lambda: self.now) for name in names]
        self.guests = Guests(self.all)
        self.guest = self.all[0]
        self.engines = Engines(3, self.guests)
        self.engines.assign(0, 0, 0)
        self.offset = 0
        self.newest: dict[str, FeatureSnapshot] = {}

    def feed(self, events: Iterable[pb.MarketEvent]) -> None:
        for event in events:
            self.offset += 1
            self.engines.take(0, self.offset, event.instrument.encode(), event.SerializeToString())

    def exchange(self) -> None:
        for guest in self.all:
            for _, snapshot in guest.exchange():
                self.newest[snapshot.feature_set.id] = snapshot

    async def until_counted(self, trades: int = TRADES, name: str = "") -> FeatureSnapshot:
        """The first vector of a set that has counted so many trades."""
        name = name or self.guest.feature_set.id

        def has() -> bool:
            self.exchange()
            return name in self.newest and self.newest[name].values[0] == trades

        await until(has)
        return self.newest[name]

    async def until_suspended(self) -> None:
        def is_suspended() -> bool:
            self.exchange()
            return self.guest.suspended

        await until(is_suspended)

    async def until_ready(self) -> None:
        def is_ready() -> bool:
            self.exchange()
            return all(guest._is_ready for guest in self.all)

        await until(is_ready)


def _open_files() -> int:
    return psutil.Process().num_fds()


@pytest.fixture
def benches() -> Iterator[list[Bench]]:
    """Those of a test; nothing is left of their processes after it."""
    open_files = _open_files()
    made: list[Bench] = []
    yield made
    children = psutil.Process().children()
    for bench in made:
        bench.guests.close()
    assert not [one for one in children if one.is_running() and "set_process" in " ".join(one.cmdline())]
    assert _open_files() <= open_files, "others may have ended meanwhile: earlier tests leave garbage"


@pytest.fixture
def bench(benches: list[Bench], request: pytest.FixtureRequest) -> Bench:
    """With the sets that the test's parameter names."""
    names = getattr(request, "param", "trades")
    benches.append(Bench(*names.split()))
    return benches[-1]


def with_sets(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bench", names, indirect=True)


async def test_a_set_sees_every_event_and_its_vector_says_which_it_is_of(bench: Bench) -> None:
    assert TRADES > 10
    bench.feed(EVENTS)
    (of_mf1,) = bench.engines.take_changed()
    found = await bench.until_counted()
    assert (found.sequence, found.event_time_ns, found.bid, found.state) == (
        of_mf1.sequence,
        of_mf1.event_time_ns,
        of_mf1.bid,
        of_mf1.state,
    )
    assert (bench.guest.events, bench.guest.waiting, bench.guest.dropped) == (len(EVENTS), 0, 0)
    assert bench.guest.seconds > 0


async def test_stale_and_refused_events_are_not_shown(bench: Bench) -> None:
    bench.feed(EVENTS[:50])
    with pytest.raises(ValueError, match="contract"):
        bench.feed([pb.MarketEvent(instrument=NAME)])
    bench.feed(event for event in EVENTS[:50] if event.WhichOneof("event") == "trade")
    bench.feed(EVENTS[50:])
    await bench.until_counted()
    assert bench.guest.events == len(EVENTS)


async def test_what_is_read_again_fills_a_set_and_is_published_from_the_end_of_the_log_on(bench: Bench) -> None:
    bench.engines.assign(0, 0, live_from=len(EVENTS) + 1)
    bench.feed(EVENTS[:-1])

    def has_all() -> bool:
        bench.exchange()
        return bench.guest.events == len(EVENTS) - 1

    await until(has_all)
    assert not bench.newest
    bench.feed(EVENTS[-1:])
    await bench.until_counted()


async def test_an_instrument_that_begins_again_gets_a_new_computer(bench: Bench) -> None:
    bench.feed(EVENTS)
    await bench.until_counted()
    bench.newest.clear()
    bench.engines.begin_again(0, 0, 0)
    bench.offset = 0
    bench.feed(EVENTS)
    await bench.until_counted()
    assert bench.guest.events == 2 * len(EVENTS)


@with_sets("late", "no_trial", "prints")
async def test_a_set_that_is_odd_but_sound_misses_nothing(bench: Bench) -> None:
    bench.guests.start()
    bench.feed(EVENTS[:10])
    bench.now += 2 * module._LONGEST_SILENCE_SECONDS
    bench.exchange()
    bench.feed(EVENTS[10:])
    await bench.until_counted()
    assert not bench.guest.suspensions


@pytest.mark.parametrize(
    ("bench", "reason"),
    [
        ("raises", "raised"),
        ("dies", "died"),
        ("negative", "impossible"),
        ("infinite", "impossible"),
        ("too_many", "impossible"),
    ],
    indirect=["bench"],
)
async def test_a_set_that_misbehaves_is_suspended_and_begins_again_and_mf1_goes_on(bench: Bench, reason: Any) -> None:
    events = iter(EVENTS)
    for times, pause in enumerate((1.0, 2.0), 1):
        bench.feed([next(events)])
        assert len(bench.engines.take_changed()) == 1
        await bench.until_suspended()
        assert bench.guest.suspensions == {reason: times}
        bench.now += pause

        def has_resumed() -> bool:
            bench.exchange()
            return not bench.guest.suspended

        await until(has_resumed)


@with_sets("keeps trades")
async def test_a_set_that_keeps_the_interpreter_for_ever_delays_neither_mf1_nor_another_set(bench: Bench) -> None:
    await bench.until_ready()
    bench.feed(EVENTS[:1])
    process = bench.guest.process
    assert process is not None
    computing = psutil.Process(process.pid)
    began = sum(computing.cpu_times()[:2])

    def is_in_the_call() -> bool:
        bench.exchange()
        return bool(sum(computing.cpu_times()[:2]) > began + 0.3)

    await until(is_in_the_call)
    vectors = []
    for event in EVENTS[1:]:
        bench.feed([event])
        vectors += bench.engines.take_changed()
    assert len(vectors) == len(EVENTS) - 1, "a vector of mf1 after each event, while the set is in its call"
    await bench.until_counted(name="trades")
    assert (bench.guest.events, bench.guest.waiting) == (0, len(EVENTS))
    assert not bench.guest.suspended
    for _ in range(60):
        bench.now += 0.1
        bench.exchange()
    assert (bench.guest.suspensions, bench.guest.dropped) == ({"stuck": 1}, len(EVENTS))

    def is_gone() -> bool:
        bench.exchange()
        return not computing.is_running()

    await until(is_gone)
    assert not bench.all[1].suspensions


@with_sets("slow")
async def test_history_is_held_back_while_a_set_has_enough_of_it_and_what_is_live_never_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_QUEUED", 400)
    bench.engines.assign(0, 0, live_from=len(EVENTS))
    bench.engines.assign(1, 0, live_from=0)
    bench.feed(EVENTS[:200])
    assert not bench.engines.held_back
    bench.feed(EVENTS[200:250])
    assert bench.engines.held_back == {0}

    def has_taken_enough() -> bool:
        bench.exchange()
        return not bench.engines.held_back

    await until(has_taken_enough)
    assert not bench.guest.suspensions


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A copy of the file of sets."""
    return Path(shutil.copy(FILE, tmp_path))


async def test_a_file_that_was_changed_meanwhile_is_noticed(benches: list[Bench], file: Path) -> None:
    bench = Bench("trades", file=file)
    benches.append(bench)
    await asyncio.to_thread(file.write_text, SOURCE.replace('"trades", ""', '"other", ""'))
    bench.feed(EVENTS[:1])
    await bench.until_suspended()
    assert bench.guest.suspensions == {"died": 1}


async def test_a_set_whose_file_is_gone_is_suspended(benches: list[Bench], file: Path) -> None:
    bench = Bench("trades", file=file)
    benches.append(bench)
    await asyncio.to_thread(file.unlink)
    bench.feed(EVENTS[:1])
    await bench.until_suspended()
    assert bench.guest.suspensions == {"raised": 1}


async def test_the_process_of_a_set_yields_to_the_worker_and_heeds_no_signal_but_its_end(bench: Bench) -> None:
    await bench.until_ready()
    assert bench.guest.process is not None
    process = psutil.Process(bench.guest.process.pid)
    assert process.nice() == psutil.Process().nice() + 10
    process.terminate()
    bench.feed(EVENTS)
    await bench.until_counted()


_WORKER = """
import sys, time
from pathlib import Path
from feature_cache import feature_sets
from feature_cache.sources.simulator import simulate
from feature_cache.worker import guests
from feature_cache.worker.engines import Engines
guests._LONGEST_SILENCE_SECONDS = 3600.0  # on a busy machine the test needs longer than a worker waits
file = Path(sys.argv[1])
keeps = next(one for one in feature_sets.of_file(file) if one.feature_set.id == "keeps")
guest = guests.Guest(keeps, guests.launcher(keeps, file))
guest.start()
while not guest._is_ready:
    guest.exchange()
    time.sleep(0.01)
print(guest.process.pid, flush=True)
sys.stdin.readline()
engines = Engines(1, guests.Guests([guest]))
engines.assign(0, 0, 0)
for offset, event in enumerate(simulate(1, ["A.SIM"])):
    engines.take(0, offset, b"A.SIM", event.SerializeToString())
    guest.exchange()
    time.sleep(0.01)
"""


async def test_a_worker_that_is_killed_leaves_no_process_even_in_a_call_that_never_returns() -> None:
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", _WORKER, str(FILE), stdin=PIPE, stdout=PIPE)
    try:
        assert worker.stdin is not None
        assert worker.stdout is not None
        process = psutil.Process(int(await worker.stdout.readline()))
        began = process.cpu_times().user
        worker.stdin.write(b"begin\n")
        await until(lambda: process.cpu_times().user > began + 0.3)  # an idle process takes nothing
    finally:
        worker.kill()
        await worker.wait()
    await until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def test_the_sets_of_the_file_are_what_the_tests_take_them_for() -> None:
    found = feature_sets.of_file(FILE)
    assert {"trades", "keeps", "dies"} <= {one.feature_set.id for one in found}
    assert all(isinstance(one, Registered) and one.own == (0,) for one in found)
