"""Stored bars in front of a worker's own, so that a restart changes no indicator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.waiting import until

from feature_cache.bars.bar import SECOND_NS, Bar, Lacks
from feature_cache.bars.maker import BarMaker
from feature_cache.bars.store import BarStore, BarStoreError
from feature_cache.sources.simulator import simulate
from feature_cache.ta1.computer import Board, Ta1Computer
from feature_cache.ta1.definition import CROSS
from feature_cache.ta1.past import COUNT, Answer, Join, Past, joined, reader

NAME = "BTCUSDT.SIM"


def made(seconds: float = 50) -> list[Bar]:
    """Bars of one second."""
    bars: list[Bar] = []
    maker = BarMaker(NAME, bars.append, "1s")
    for event in simulate(5, [NAME], duration_seconds=seconds, events_per_second=10):
        maker.on_event(event)
    return bars


BARS = made()


class AtOnce(Past):
    """Has the answer when it is asked."""

    def __init__(self, bars: Sequence[Bar] = ()) -> None:
        self.bars = bars
        self.asked = 0

    def ask(self, instrument: str, interval: str, until_ns: int) -> Answer:
        self.asked += 1
        answer = Answer()
        answer.bars = [one for one in self.bars if one.start_ns <= until_ns]
        return answer


def added(join: Join, bar: Bar) -> list[Bar] | None:
    join.add(bar)
    return join.found()


def cut(bar: Bar) -> Bar:
    """A bar that was not read from its beginning."""
    return replace(bar, trades=0, open=None, high=None, low=None, close=None, lacks=Lacks.BEGINNING | Lacks.MID)


async def test_a_worker_that_was_away_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    events = list(simulate(2, [NAME], duration_seconds=100, events_per_second=30))
    url = f"sqlite:///{tmp_path / 'bars.db'}"
    store = BarStore(url)
    store.prepare()
    bars: list[Bar] = []
    maker, whole = BarMaker(NAME, bars.append, "10s"), Ta1Computer(NAME, None, Board())
    for event in events:
        maker.on_event(event)
        whole.on_event(event)
    store.write(bars)
    store.close()
    late = Ta1Computer(NAME, None, Board(), Past(reader(url)))
    first_ns = events[0].event_time_ns
    read_again = [one for one in events if one.event_time_ns > first_ns + 65 * SECOND_NS]
    begun = [one for one in read_again if one.event_time_ns < first_ns + 85 * SECOND_NS]
    alone = Ta1Computer(NAME, None, Board())
    for event in begun:
        late.on_event(event)
        alone.on_event(event)
    await until(lambda: late.values() is not None and not late._joins)  # found while no bar has ended
    assert np.isnan(late.values()).sum() < np.isnan(alone.values()).sum() - 20
    for event in read_again[len(begun) :]:
        late.on_event(event)
    np.testing.assert_array_equal(late.values(), whole.values())
    defined = np.isfinite(late.values()[: -len(CROSS)])
    assert defined[: len(defined) // 2].all()


def test_stored_bars_are_put_before_ours_and_count_where_both_have_one() -> None:
    own = [cut(BARS[10]), *BARS[11:15]]
    assert joined(BARS[:13], own) == BARS[:15]
    assert joined(BARS[:11], own) == BARS[:15]
    assert joined(BARS[:15], own) == BARS[:15]


@pytest.mark.parametrize("stored", [[], BARS[:10], BARS[11:13], [*BARS[:8], *BARS[11:13]]])
def test_where_a_bar_between_is_missing_there_is_no_history(stored: list[Bar]) -> None:
    assert joined(stored, [cut(BARS[10]), *BARS[11:15]]) is None


def test_what_is_before_a_gap_in_the_stored_bars_is_left_out() -> None:
    own = [cut(BARS[10]), BARS[11]]
    assert joined([*BARS[:4], *BARS[6:11]], own) == BARS[6:12]
    begun = [*BARS[:4], replace(BARS[4], lacks=Lacks.BEGINNING), *BARS[5:11]]
    assert joined(begun, own) == [begun[4], *BARS[5:12]]


def test_a_keeper_that_is_behind_is_waited_for_and_not_asked_at_every_bar() -> None:
    past = AtOnce()
    join = Join(past)
    own = [cut(BARS[10]), *BARS[11:]]
    for number, bar in enumerate(own[:20], 1):
        assert added(join, bar) is None
        assert past.asked == number.bit_length(), "at the bars 1, 2, 4, 8 and 16"
    past.bars = BARS[:25]
    found = [history for bar in own[20:] if not join.is_over and (history := added(join, bar)) is not None]
    assert join.is_over
    assert len(found) == 1
    assert found[0] == BARS[: len(found[0])]


def test_a_new_series_and_enough_bars_of_ours_end_the_search() -> None:
    def over_after(bars: Sequence[Bar]) -> list[bool]:
        join = Join(AtOnce())
        return [added(join, bar) is None and join.is_over for bar in bars]

    assert over_after([cut(BARS[0]), cut(BARS[9])]) == [False, True], "what was before is no longer its history"
    assert over_after([BARS[3]] * (COUNT + 1)) == [*[False] * COUNT, True]


async def test_a_database_that_fails_costs_nothing_but_the_history_and_is_asked_again() -> None:
    fails = True

    def read(instrument: str, interval: str, until_ns: int, count: int) -> list[Bar]:
        if fails:
            raise BarStoreError("no")
        assert (instrument, interval, count) == (NAME, "1s", COUNT)
        return [one for one in BARS if one.start_ns <= until_ns]

    join = Join(Past(read))
    own = iter([cut(BARS[10]), *BARS[11:]])
    assert added(join, next(own)) is None
    await until(lambda: join._answer is not None and join._answer.bars is not None)
    fails = False
    assert added(join, next(own)) is None
    await until(lambda: join._answer is not None and join._answer.bars is not None)
    assert added(join, next(own)) == BARS[:13]
