"""What the process of a set does with batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from support.guest_sets import MIXED, Trades

from feature_cache.feature_sets import Computer, ImpossibleValuesError, Registered
from feature_cache.sources.simulator import simulate
from feature_cache.worker.set_messages import Answer, Batch, Entry, Progress, Ready
from feature_cache.worker.set_process import Calculation
from pretrade.market.v1 import market_pb2 as pb

NAME = "A.SIM"
EVENTS = list(itertools.islice(simulate(1, [NAME]), 400))


def trades(events: Sequence[pb.MarketEvent]) -> int:
    return sum(event.WhichOneof("event") == "trade" for event in events)


def entries(events: Sequence[pb.MarketEvent], engine: int = 0) -> list[Entry]:
    return [Entry(engine, place == 0, event.SerializeToString()) for place, event in enumerate(events)]


class Bench:
    """A calculation whose clock advances by `per_event` with each event of a set, and whose CPU time is that."""

    def __init__(self, make: Callable[[str], Computer] = Trades, per_event: float = 0.0) -> None:
        self.now = 0.0
        self.paused: list[float] = []
        self.told: list[Answer] = []

        class Timed:
            def __init__(timed, instrument: str) -> None:  # noqa: N805 - `self` is the bench
                timed.inner = make(instrument)

            def on_event(timed, event: pb.MarketEvent) -> None:  # noqa: N805
                self.now += per_event
                timed.inner.on_event(event)

            def values(timed) -> NDArray[np.float32]:  # noqa: N805
                return timed.inner.values()

        registered = Registered(MIXED, Timed, "the tests")
        self.calculation = Calculation(
            registered, self.told.append, lambda: self.now, lambda: self.now, self.paused.append
        )

    def progress(self) -> list[Progress]:
        return [one for one in self.told if isinstance(one, Progress)]


def test_it_is_ready_when_a_computer_could_be_made_and_also_when_not() -> None:
    def fails(instrument: str) -> Computer:
        raise KeyError(instrument)

    for make in (Trades, fails):
        bench = Bench(make)
        bench.calculation.begin()
        assert bench.told == [Ready(MIXED.fingerprint)]


def test_a_vector_is_of_all_batches_that_have_come_and_names_the_newest_that_wanted_it() -> None:
    bench = Bench()
    all_of_it = entries(EVENTS)
    bench.calculation.take(Batch(all_of_it[:100], [0]))
    bench.calculation.take(Batch(all_of_it[100:300], [0]))
    bench.calculation.take(Batch(all_of_it[300:], []))
    bench.calculation.answer()
    (progress,) = bench.progress()
    assert (progress.taken, progress.answered) == (len(EVENTS), 3)
    (vector,) = progress.vectors
    assert (vector.batch, vector.engine, vector.values[1]) == (2, 0, trades(EVENTS))
    bench.calculation.answer()
    assert not bench.progress()[-1].vectors, "it was given once"


def test_history_gives_no_vector_and_an_instrument_may_be_asked_for_without_an_event() -> None:
    bench = Bench()
    bench.calculation.take(Batch(entries(EVENTS), []))
    bench.calculation.answer()
    bench.calculation.take(Batch([], [0]))
    bench.calculation.answer()
    first, second = bench.progress()
    assert not first.vectors
    assert [(one.batch, one.values[1]) for one in second.vectors] == [(2, trades(EVENTS))]


def test_an_instrument_that_begins_again_has_a_new_computer_and_the_old_one_gives_nothing_more() -> None:
    bench = Bench()
    bench.calculation.take(Batch(entries(EVENTS), [0]))
    bench.calculation.take(Batch(entries(EVENTS[:50], engine=1), [1]))
    bench.calculation.answer()
    (progress,) = bench.progress()
    assert [(one.engine, one.values[1]) for one in progress.vectors] == [(1, trades(EVENTS[:50]))]


def test_during_long_work_it_says_how_far_it_is_and_rests_for_as_long_as_it_has_worked() -> None:
    bench = Bench(per_event=0.04)
    bench.calculation.take(Batch(entries(EVENTS[:10]), [0]))
    bench.calculation.take(Batch(entries(EVENTS[:2], engine=1), [1]))
    bench.calculation.answer()
    progress = bench.progress()
    assert [one.taken for one in progress] == [3, 6, 9, 12, 12]
    assert [one.answered for one in progress] == [0, 0, 0, 0, 2], "nobody may forget what it is still asked for"
    assert bench.paused == pytest.approx([0.12, 0.12, 0.12, 0.12, 0.0])
    assert progress[-1].cpu_seconds == pytest.approx(0.48)


def test_values_that_the_set_excludes_are_never_given() -> None:
    class Negative(Trades):
        def values(self) -> NDArray[np.float32]:
            return np.array([-1.0], dtype=np.float32)

    bench = Bench(Negative)
    bench.calculation.take(Batch(entries(EVENTS[:1]), [0]))
    with pytest.raises(ImpossibleValuesError, match="trades is -1"):
        bench.calculation.answer()
    assert not bench.told
