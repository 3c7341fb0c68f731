"""Bars against the same bars counted again from the events, one interval at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_cache.bars.bar import INTERVALS, SECOND_NS, Bar, Lacks
from feature_cache.bars.maker import LONGEST_PAUSE_NS, BarMaker
from feature_cache.engine.book import EventError
from feature_cache.engine.market import MAX_BEHIND_NS
from feature_cache.sources.simulator import simulate
from pretrade.market.v1 import market_pb2 as pb

NAME: Final = "BTCUSDT.TEST"
SIMULATED: Final = "BTCUSDT.SIM"
START: Final = 1_700_000_100 * SECOND_NS  # begins a bar of every interval
MS: Final = 1_000_000
BUY, SELL, UNKNOWN = pb.TAKER_SIDE_BUY, pb.TAKER_SIDE_SELL, pb.TAKER_SIDE_UNSPECIFIED


def event(time_ns: int, **body: pb.BookSnapshot | pb.BookDelta | pb.Quote | pb.Trade | pb.BookReset) -> pb.MarketEvent:
    return pb.MarketEvent(
        instrument=NAME,
        price_decimals=2,
        size_decimals=3,
        event_time_ns=time_ns,
        receive_time_ns=time_ns,
        publish_time_ns=time_ns,
        **body,  # type: ignore[arg-type]  # one field of the oneof
    )


def trade(
    time_ns: int, number: int, ticks: int = 100, lots: int = 1, side: pb.TakerSide.ValueType = BUY
) -> pb.MarketEvent:
    return event(time_ns, trade=pb.Trade(trade_id=number, price_ticks=ticks, lots=lots, taker_side=side))


def book(time_ns: int, update_id: int, bid: int | None, ask: int | None) -> pb.MarketEvent:
    """A whole book of one level a side."""
    body = pb.BookSnapshot(
        last_update_id=update_id,
        bid_ticks=[] if bid is None else [bid],
        bid_lots=[] if bid is None else [5],
        ask_ticks=[] if ask is None else [ask],
        ask_lots=[] if ask is None else [5],
    )
    return event(time_ns, snapshot=body)


def gap(time_ns: int, update_id: int) -> pb.MarketEvent:
    """A delta that does not follow on: the book is unknown, trades are not."""
    body = pb.BookDelta(first_update_id=update_id, last_update_id=update_id, bid_ticks=[1], bid_lots=[1])
    return event(time_ns, delta=body)


def reset(time_ns: int) -> pb.MarketEvent:
    return event(time_ns, reset=pb.BookReset(reason="reconnect"))


def bars_of(events: Iterable[pb.MarketEvent], name: str = NAME) -> list[Bar]:
    made: list[Bar] = []
    maker = BarMaker(name, made.append)
    for one in events:
        maker.on_event(one)
    return made


def of(made: Sequence[Bar], interval: str) -> list[Bar]:
    return [bar for bar in made if bar.interval == interval]


def seconds(*values: float) -> list[int]:
    return [START + round(value * 1000) * MS for value in values]


def test_a_bar_sums_its_trades_by_side_and_weights_its_price_by_size() -> None:
    at = seconds(0, 0.2, 0.4, 0.6, 1)
    events = [trade(at[0], 1, 100, 3), trade(at[1], 2, 104, 1, SELL), trade(at[2], 3, 99, 2, UNKNOWN)]
    (bar,) = bars_of([*events, trade(at[3], 4, 101, 4, SELL), trade(at[4], 5)])
    assert (bar.open, bar.high, bar.low, bar.close) == (100, 104, 99, 101)
    assert (bar.trades, bar.bought, bar.sold, bar.lots) == (4, 3, 5, 10)
    assert bar.vwap == (300 + 104 + 198 + 404) / 10 / 100
    assert (bar.start_ns, bar.end_ns, bar.interval) == (START, START + SECOND_NS, "1s")
    assert (bar.price(bar.high), bar.size(bar.lots)) == (1.04, 0.01)


def test_a_trade_at_the_very_end_of_a_bar_belongs_in_the_next() -> None:
    (bar,) = bars_of([trade(START, 1), trade(START + SECOND_NS, 2)])
    assert bar.trades == 1


def test_a_bar_without_a_trade_is_a_row_that_says_so_and_keeps_the_mid_that_stood() -> None:
    made = bars_of([book(START, 1, 99, 101), trade(START, 1), trade(START + 3 * SECOND_NS, 2)])
    assert [bar.trades for bar in made] == [1, 0, 0]
    quiet = made[1]
    assert (quiet.open, quiet.close, quiet.lots) == (None, None, 0)
    assert (quiet.mid_open, quiet.mid_high, quiet.mid_low, quiet.mid_close) == (200, 200, 200, 200)
    assert quiet.lacks is Lacks.NOTHING
    assert math.isnan(quiet.vwap)
    assert math.isnan(quiet.price(quiet.open))


def test_the_mid_begins_where_it_stood_and_holds_every_change() -> None:
    at = seconds(0, 1.1, 1.2, 1.3, 2)
    quotes = [(100, 102), (98, 101), (105, 107), (99, 102)]
    events = [book(time_ns, number, *best) for number, (time_ns, best) in enumerate(zip(at, quotes, strict=False), 1)]
    bar = bars_of([*events, trade(at[4], 1)])[1]
    assert (bar.mid_open, bar.mid_high, bar.mid_low, bar.mid_close) == (202, 212, 199, 201)
    assert bar.mid(bar.mid_low) == 0.995
    assert bar.lacks is Lacks.NOTHING


def test_the_first_bar_of_a_reading_and_the_longer_ones_with_it_lack_the_beginning() -> None:
    events = [trade(time_ns, number) for number, time_ns in enumerate(seconds(*range(12, 40)), 1)]
    made = bars_of([book(seconds(12)[0], 1, 99, 101), *events])
    assert made[0].lacks == Lacks.BEGINNING | Lacks.MID
    assert not made[0].is_complete
    assert [bar.is_complete for bar in of(made, "1s")[1:]] == [True] * 26
    assert [(bar.start_ns, bar.is_complete) for bar in of(made, "10s")] == [
        (seconds(10)[0], False),
        (seconds(20)[0], True),
    ]


def test_from_a_reset_until_something_is_heard_again_every_bar_lacks_continuity() -> None:
    at = seconds(0, 1, 2, 2.5, 5.5, 6, 7)
    events = [book(at[0], 1, 99, 101), trade(at[1], 1), trade(at[2], 2), reset(at[3]), trade(at[4], 3), trade(at[5], 4)]
    made = bars_of([*events, trade(at[6], 5)])
    cut = Lacks.CONTINUITY | Lacks.MID
    assert [bar.lacks for bar in made[1:]] == [Lacks.NOTHING, cut, cut, cut, cut, Lacks.MID]
    assert [bar.trades for bar in made] == [0, 1, 1, 0, 0, 1, 1]


def test_a_reset_inside_one_bar_cuts_it_and_the_longer_ones_around_it_only() -> None:
    at = seconds(*range(25))
    events = [trade(time_ns, number) for number, time_ns in enumerate(at, 1)]
    events[15:15] = [reset(at[14] + 100 * MS), trade(at[14] + 200 * MS, 1)]
    made = bars_of(events)
    assert [bar.start_ns for bar in of(made, "1s")[1:] if not bar.is_complete] == [at[14]]
    assert [bar.is_complete for bar in of(made, "10s")] == [False, False]
    assert of(made, "10s")[1].trades == 11


def test_a_gap_in_the_book_takes_the_mid_and_not_the_trades() -> None:
    at = seconds(0, 1.1, 1.2, 1.5, 2, 3, 4)
    events = [
        book(at[0], 1, 99, 101),
        trade(at[1], 1),
        gap(at[2], 9),
        trade(at[3], 2),
        trade(at[4], 3),
        trade(at[5], 4),
    ]
    made = bars_of([*events, book(at[5] + MS, 20, 89, 91), trade(at[6], 5)])
    assert [bar.lacks for bar in made[1:]] == [Lacks.MID, Lacks.MID, Lacks.MID]
    assert [bar.mid_close for bar in made] == [200, 200, None, 180]
    assert [bar.trades for bar in made] == [0, 2, 1, 1]
    assert all(bar.is_complete for bar in made[1:])


def test_a_book_with_one_side_has_no_mid() -> None:
    at = seconds(0, 1, 2, 3)
    made = bars_of([book(at[0], 1, 99, 101), book(at[1], 2, None, 101), trade(at[2], 1), trade(at[3], 2)])
    assert made[2].mid_open is None
    assert made[2].lacks is Lacks.MID


def test_after_a_pause_too_long_to_fill_a_new_series_begins() -> None:
    late = START + LONGEST_PAUSE_NS + 5 * SECOND_NS
    made = bars_of([trade(START, 1), trade(START + SECOND_NS, 2), trade(late, 3), trade(late + SECOND_NS, 4)])
    assert [bar.start_ns for bar in of(made, "1s")] == [START, START + SECOND_NS, late]
    assert made[-1].lacks & Lacks.BEGINNING
    assert [(bar.interval, bar.trades) for bar in made if bar.interval != "1s"] == [("10s", 2), ("1m", 2), ("5m", 2)]
    assert all(bar.lacks & Lacks.CONTINUITY for bar in made if bar.interval != "1s")


def test_a_pause_that_can_be_filled_is_filled_to_the_second() -> None:
    made = bars_of([trade(START, 1), trade(START + LONGEST_PAUSE_NS, 2)])
    assert [bar.start_ns for bar in of(made, "1s")] == [START + second * SECOND_NS for second in range(600)]
    assert [bar.trades for bar in of(made, "5m")] == [1, 0]


def test_time_that_runs_back_a_little_counts_in_the_bar_under_way_and_never_in_one_that_has_ended() -> None:
    made = bars_of([trade(START, 1), trade(START + SECOND_NS, 2), trade(START, 3), trade(START + 2 * SECOND_NS, 4)])
    assert [bar.trades for bar in made] == [1, 2]


def test_time_that_runs_back_far_begins_a_new_series() -> None:
    back = START - MAX_BEHIND_NS - SECOND_NS
    made = bars_of([trade(START, 1), trade(back, 2), trade(back + SECOND_NS, 3)])
    assert [(bar.interval, bar.start_ns) for bar in made[:1]] == [("1s", START)]
    assert made[0].lacks & Lacks.CONTINUITY
    last = of(made, "1s")[-1]
    assert (last.start_ns, last.trades, last.lacks) == (back, 1, Lacks.BEGINNING | Lacks.MID)


def test_other_decimals_after_a_reset_begin_a_new_series() -> None:
    other = trade(START + 2 * SECOND_NS, 1, 1000)
    other.price_decimals = 3
    more = trade(START + 3 * SECOND_NS, 2, 1000)
    more.price_decimals = 3
    made = bars_of([trade(START, 1), reset(START + SECOND_NS), other, more])
    assert [(bar.price_decimals, bar.trades) for bar in of(made, "1s")] == [(2, 1), (3, 1)]
    assert of(made, "1s")[1].lacks & Lacks.BEGINNING


def test_an_event_that_breaks_the_contract_changes_no_bar() -> None:
    made: list[Bar] = []
    maker = BarMaker(NAME, made.append)
    maker.on_event(trade(START, 1))
    with pytest.raises(EventError, match=r"trade\.lots"):
        maker.on_event(trade(START + 5 * SECOND_NS, 2, lots=0))
    assert not made


def test_only_the_intervals_that_are_wanted_are_made() -> None:
    made: list[Bar] = []
    maker = BarMaker(NAME, made.append, longest="10s")
    for number, time_ns in enumerate(seconds(*range(61)), 1):
        maker.on_event(trade(time_ns, number))
    assert {bar.interval for bar in made} == {"1s", "10s"}


def counted_again(events: Sequence[pb.MarketEvent], bar: Bar) -> tuple[object, ...]:
    """The trades of a bar, straight from the events, which are in order of time."""
    trades = [one.trade for one in events if bar.start_ns <= one.event_time_ns < bar.end_ns and one.HasField("trade")]
    prices = [one.price_ticks for one in trades]
    return (
        prices[0] if prices else None,
        max(prices, default=None),
        min(prices, default=None),
        prices[-1] if prices else None,
        len(trades),
        sum(one.lots for one in trades if one.taker_side == BUY),
        sum(one.lots for one in trades if one.taker_side == SELL),
        sum(one.lots for one in trades),
        sum(one.price_ticks * one.lots for one in trades),
    )


def trades_of(bar: Bar) -> tuple[object, ...]:
    sums = (bar.trades, bar.bought, bar.sold, bar.lots, bar.notional)
    return (bar.open, bar.high, bar.low, bar.close, *sums)


@cache
def _simulated_minute() -> tuple[bytes, ...]:
    events = simulate(7, [SIMULATED], duration_seconds=61, events_per_second=30)
    return tuple(one.SerializeToString() for one in events)


def simulated_minute() -> list[pb.MarketEvent]:
    return [pb.MarketEvent.FromString(one) for one in _simulated_minute()]


def test_bars_of_a_simulated_market_are_what_its_trades_add_up_to_at_every_interval() -> None:
    events = simulated_minute()
    made = bars_of(events, SIMULATED)
    assert {bar.interval for bar in made} == {"1s", "10s", "1m"}
    # Deltas carry the time of their end, so that a trade may come after one that is later: it counts then.
    time_ns = 0
    for one in events:
        time_ns = one.event_time_ns = max(time_ns, one.event_time_ns)
    for bar in made:
        assert trades_of(bar) == counted_again(events, bar)
    for interval in ("1s", "10s", "1m"):
        starts = [bar.start_ns for bar in of(made, interval)]
        assert starts == list(range(starts[0], starts[0] + len(starts) * INTERVALS[interval], INTERVALS[interval]))


@pytest.mark.parametrize("skipped", [1, 50, 333, 700])
def test_wherever_a_reading_begins_the_bars_after_its_first_ones_are_the_same(skipped: int) -> None:
    """After a restart the log is read again from some point; the book is known from the next snapshot on."""
    events = simulated_minute()
    whole = {(bar.width_ns, bar.start_ns): bar for bar in bars_of(events, SIMULATED)}
    again = bars_of(events[skipped:], SIMULATED)
    for bar in again:
        first = whole[bar.width_ns, bar.start_ns]
        if bar.lacks is Lacks.NOTHING:
            assert bar == first
        elif bar.is_complete:  # the mid was not known yet
            assert trades_of(bar) == trades_of(first)
        assert bar.lacks >= first.lacks
    assert sum(bar.lacks is Lacks.NOTHING for bar in again) > 35


steps = st.tuples(st.sampled_from(["trade", "book", "one side", "gap", "reset", "pause"]), st.integers(0, 1500))


@given(st.lists(steps, min_size=5, max_size=60))
@settings(max_examples=40, deadline=None)
def test_whatever_happens_no_trade_is_lost_or_counted_twice(
    given_steps: list[tuple[str, int]],
) -> None:
    time_ns = START
    events = []
    for number, (kind, wait) in enumerate(given_steps, 1):
        time_ns += wait * MS * (100 if kind == "pause" else 1)
        events.append(
            {
                "trade": trade(time_ns, number, 100 + wait % 7, 1 + wait % 3, SELL if wait % 2 else BUY),
                "book": book(time_ns, 10 * number, 100 + wait % 5, 106),
                "one side": book(time_ns, 10 * number, None, 106),
                "gap": gap(time_ns, 10 * number + 5),
                "reset": reset(time_ns),
                "pause": trade(time_ns, number),
            }[kind]
        )
    end = trade(time_ns + 400 * SECOND_NS, 10**6)
    made = bars_of([*events, end])
    expected = sum(one.HasField("trade") for one in events)
    for interval in INTERVALS:
        one_interval = of(made, interval)
        assert all(a.end_ns == b.start_ns for a, b in pairwise(one_interval))
        assert sum(bar.trades for bar in one_interval) == expected
    for bar in made:
        assert trades_of(bar) == counted_again(events, bar)
        assert (bar.mid_open is None) <= bool(bar.lacks & Lacks.MID)
        assert replace(bar, lacks=Lacks.NOTHING).is_complete
