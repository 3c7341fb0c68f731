"""Stored bars in front of a worker's own, so that a restart changes no indicator."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs
from support.plain_market import START_NS, PlainMarket
from support.waiting import until

from feature_cache.bars.bar import SECOND_NS, Bar, Lacks
from feature_cache.bars.maker import BarMaker
from feature_cache.bars.store import BarStore, BarStoreError
from feature_cache.sources.simulator import simulate
from feature_cache.ta1.computer import Board, Indicators, Ta1Computer
from feature_cache.ta1.definition import LONG_INTERVALS, TA1_LONG
from feature_cache.ta1.indicators import HISTORY_BARS
from feature_cache.ta1.past import Join, Look, Past, joined, reaching, reader
from feature_cache.ta1.series import Series
from pretrade.market.v1 import market_pb2 as pb

NAME, PARTNER = "BTCUSDT.SIM", "ETHUSDT.SIM"


def made(seconds: float = 50) -> list[Bar]:
    """Bars of one second."""
    bars: list[Bar] = []
    maker = BarMaker(NAME, bars.append, "1s")
    for event in simulate(5, [NAME], duration_seconds=seconds, events_per_second=10):
        maker.on_event(event)
    return bars


BARS = made()


class AtOnce(Past):
    """Has the answer when it is asked, unless it is to wait."""

    def __init__(self, bars: Sequence[Bar] = ()) -> None:
        super().__init__(self.stored)
        self.bars = bars
        self.asked: list[Look] = []
        self.waits = False

    def stored(self, instrument: str, interval: str, until_ns: int, count: int) -> list[Bar]:
        return [one for one in self.bars if one.interval == interval and one.start_ns <= until_ns][-count:]

    def ask(self, look: Look) -> None:
        self.asked.append(look)
        if not self.waits:
            self.release()

    def release(self) -> None:
        """Gives the newest answer."""
        self.answer(self.asked[-1])
        self.asked[-1].is_over = True


class Ours:
    """A join that gets bars of a second."""

    def __init__(self, past: Past, first: Bar) -> None:
        self.join = Join(past, NAME, "1s")
        self.begun_ns = first.start_ns

    def add(self, bar: Bar) -> Series | None:
        self.join.add(bar)
        return self.join.found(self.begun_ns, bar.end_ns)


def cut(bar: Bar) -> Bar:
    """A bar that was not read from its beginning."""
    return replace(bar, trades=0, open=None, high=None, low=None, close=None, lacks=Lacks.BEGINNING | Lacks.MID)


def after(bars: Sequence[Bar]) -> NDArray[np.float32]:
    """The indicators after these bars, one by one."""
    series = Series()
    for bar in bars:
        series.add(bar)
    return series.values


async def test_a_worker_that_was_away_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """It reads the last 45 s again, as by default. What the partner says comes from these alone."""
    events = list(simulate(2, [NAME, PARTNER], duration_seconds=500, events_per_second=5))
    url = f"sqlite:///{tmp_path / 'bars.db'}"
    store = BarStore(url)
    store.prepare()
    bars: list[Bar] = []
    maker = BarMaker(NAME, bars.append, "10s")
    end_ns = events[-1].event_time_ns
    for event in events:
        if event.instrument == NAME:
            maker.on_event(event)
    store.write(bars)
    store.close()

    def computers(past: Past | None) -> dict[str, Ta1Computer]:
        board = Board()
        return {NAME: Ta1Computer(NAME, PARTNER, board, past), PARTNER: Ta1Computer(PARTNER, None, board)}

    whole, late, alone = computers(None), computers(Past(reader(url))), computers(None)
    for event in events:
        whole[event.instrument].on_event(event)
        if event.event_time_ns > end_ns - 45 * SECOND_NS:
            late[event.instrument].on_event(event)
            alone[event.instrument].on_event(event)
    await until(lambda: late[NAME].values() is not None and late[NAME].indicators.is_joined)
    found = late[NAME].values()
    np.testing.assert_array_equal(found, whole[NAME].values())
    assert np.isfinite(found).all()
    assert np.isnan(alone[NAME].values()).sum() > len(found) / 3


@cache
def long_market() -> tuple[tuple[pb.MarketEvent, ...], tuple[Bar, ...]]:
    """Events of four hours, and the bars that a keeper made of them."""
    bars: list[Bar] = []
    maker = BarMaker(NAME, bars.append)
    events = tuple(PlainMarket(NAME, trades=1).run(4 * 3600))
    for event in events:
        maker.on_event(event)
    return events, tuple(bars)


RESTART = 2 * (4 * 3600 - 800) + 1
"""Place of the first event of a worker that begins 800 s before the end, which is amid a bar of either interval."""
FIRST_END_NS = START_NS + (4 * 3600 - 780) * SECOND_NS
"""Where its first bar of a minute ends."""


OF_ONE_BAR = {"bop_1m", "above_mid_bps_1m"}


def defined(minutes: Indicators) -> set[str]:
    """The features over bars of a minute that have a value."""
    return {
        name for name, value in zip(TA1_LONG.names, minutes.values().tolist(), strict=False) if not math.isnan(value)
    }


def test_indicators_over_minutes_go_on_from_the_first_event_after_a_restart_and_over_each_end_of_a_bar() -> None:
    events, bars = long_market()
    whole, past = Indicators(NAME, LONG_INTERVALS), AtOnce(bars)
    late = Indicators(NAME, LONG_INTERVALS, past)
    for event in events[:RESTART]:
        whole.on_event(event)
    before, ends = whole.values(), 0
    for event in events[RESTART:]:
        whole.on_event(event)
        late.on_event(event)
        late.values()  # this asks
        ends += whole.values() is not before
        before = whole.values()
        np.testing.assert_array_equal(late.values(), before)
    assert ends == 13
    assert late.is_joined
    assert np.isfinite(late.values()).all(), "also those over bars of five minutes"
    assert len(past.asked) == 4, "for each interval once at the start, and once for the first bar"


def test_without_stored_bars_indicators_over_minutes_are_undefined_for_hours() -> None:
    events, _ = long_market()
    alone = Indicators(NAME, LONG_INTERVALS, AtOnce())
    for event in events[:7200]:
        alone.on_event(event)
    assert "macd_bps_1m" in defined(alone)
    assert "macd_bps_5m" not in defined(alone)


def test_between_the_end_of_our_first_bar_and_the_keepers_answer_all_is_undefined() -> None:
    """The stored bars before it are no longer the last ones, and ours was not read from its beginning."""
    events, bars = long_market()
    past = AtOnce([one for one in bars if one.end_ns < FIRST_END_NS])
    late = Indicators(NAME, ("1m",), past)
    for event in events[RESTART:]:
        late.on_event(event)
        late.values()
        after_ns = event.event_time_ns - FIRST_END_NS
        if after_ns < 0:
            assert np.isfinite(late.values()).all()
        elif after_ns < SECOND_NS:
            assert defined(late) <= OF_ONE_BAR
            past.bars = bars  # the keeper has the bar by now
        elif after_ns > 2 * SECOND_NS:
            assert np.isfinite(late.values()).all(), "it is asked again a second later, and not a bar"
            return
    raise AssertionError


def test_an_answer_that_comes_after_our_first_bar_has_ended_is_not_taken() -> None:
    events, bars = long_market()
    past = AtOnce(bars)
    past.waits = True
    late = Indicators(NAME, ("1m",), past)
    for event in events[RESTART:]:
        late.on_event(event)
        late.values()
        if event.event_time_ns >= FIRST_END_NS:
            break
    past.release()
    assert not past.asked[-1].own
    assert defined(late) <= OF_ONE_BAR
    past.release()
    assert past.asked[-1].own
    assert np.isfinite(late.values()).all()


def test_bars_that_ended_while_the_database_was_asked_are_added() -> None:
    past = AtOnce(BARS)
    past.waits = True
    ours = Ours(past, BARS[10])
    own = [cut(BARS[10]), *BARS[11:20]]
    assert [ours.add(bar) for bar in own] == [None] * len(own)
    past.release()
    series = ours.add(BARS[20])
    assert series is not None
    np.testing.assert_array_equal(series.values, after(BARS[:21]))


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


def test_stored_bars_that_end_where_ours_begin_are_a_history_and_others_are_none() -> None:
    start_ns = BARS[10].start_ns
    assert reaching(BARS[:10], start_ns) == BARS[:10]
    assert reaching([*BARS[:4], *BARS[6:10]], start_ns) == BARS[6:10]
    for stored in ([], BARS[:9], BARS[:11]):
        assert reaching(stored, start_ns) is None


def test_a_keeper_that_is_behind_is_waited_for_and_not_asked_at_every_bar() -> None:
    past = AtOnce()
    ours = Ours(past, BARS[10])
    own = [cut(BARS[10]), *BARS[11:]]
    for number, bar in enumerate(own[:20]):
        assert ours.add(bar) is None
        assert len(past.asked) == (number + 1).bit_length(), "after 0, 1, 3, 7 and 15 s"
    past.bars = BARS[:25]
    found = [series for bar in own[20:] if not ours.join.is_over and (series := ours.add(bar)) is not None]
    assert ours.join.is_over
    assert len(found) == 1


def test_a_new_series_and_enough_bars_of_ours_end_the_search() -> None:
    def over_after(bars: Sequence[Bar]) -> list[bool]:
        ours = Ours(AtOnce(), bars[0])
        return [ours.add(bar) is None and ours.join.is_over for bar in bars]

    assert over_after([cut(BARS[0]), cut(BARS[9])]) == [False, True], "what was before is no longer its history"
    assert over_after([BARS[3]] * (HISTORY_BARS + 1)) == [*[False] * HISTORY_BARS, True]


async def answered(ours: Ours) -> None:
    look = ours.join._look
    assert look is not None
    await until(lambda: look.is_over)


@pytest.mark.parametrize(
    ("error", "event", "times"),
    [(BarStoreError("no"), "ta1.no_stored_bars", 1), (KeyError("price_decimals"), "ta1.look_failed", 2)],
)
async def test_a_database_that_fails_costs_nothing_but_the_history_and_is_asked_again(
    error: Exception, event: str, times: int
) -> None:
    fails = True

    def read(instrument: str, interval: str, until_ns: int, count: int) -> list[Bar]:
        if fails:
            raise error
        assert (instrument, interval, count) == (NAME, "1s", HISTORY_BARS)
        return [one for one in BARS if one.start_ns <= until_ns]

    ours = Ours(Past(read), BARS[10])
    own = [cut(BARS[10]), *BARS[11:]]
    with capture_logs() as logged:
        for bar in own[:2]:
            assert ours.add(bar) is None
            await answered(ours)
    assert [one["event"] for one in logged] == [event] * times
    fails = False
    assert ours.add(own[2]) is None
    assert ours.add(own[3]) is None
    await answered(ours)
    series = ours.add(own[4])
    assert series is not None
    np.testing.assert_array_equal(series.values, after(BARS[:15]))


async def test_the_history_is_computed_where_the_database_is_asked_and_nobody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resumed_in: list[threading.Thread] = []
    resume: Callable[[Series, Sequence[Bar]], None] = Series.resume

    def noted(series: Series, bars: Sequence[Bar]) -> None:
        resumed_in.append(threading.current_thread())
        resume(series, bars)

    monkeypatch.setattr(Series, "resume", noted)
    ours = Ours(Past(lambda *_: BARS[:11]), BARS[10])
    assert ours.add(cut(BARS[10])) is None
    await answered(ours)
    assert ours.add(BARS[11]) is not None
    assert len(resumed_in) == 1
    assert threading.current_thread() not in resumed_in
