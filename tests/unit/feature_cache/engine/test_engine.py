"""The engine against an independent computation over the whole history, straight from the definitions."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.mf1_definitions import History

from feature_cache import features
from feature_cache.engine.book import EventError
from feature_cache.engine.engine import FeatureEngine
from feature_cache.sources.session import read_session, session_files
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import BookState, FeatureSnapshot, decode, encode
from pretrade.market.v1 import market_pb2 as pb

DATA: Final = Path(__file__).parents[4] / ".." / "shared" / "data" / "binance_spot"
NAME: Final = "BTCUSDT.TEST"
START: Final = 1_700_000_000_000_000_000
MS: Final = 1_000_000
LATENCY: Final = 3 * MS
Side = dict[int, int]


def event(time_ns: int, **body: pb.BookSnapshot | pb.BookDelta | pb.Quote | pb.Trade | pb.BookReset) -> pb.MarketEvent:
    return pb.MarketEvent(
        instrument=NAME,
        price_decimals=2,
        size_decimals=3,
        event_time_ns=time_ns,
        receive_time_ns=time_ns + LATENCY,
        publish_time_ns=time_ns + LATENCY,
        **body,  # type: ignore[arg-type]  # one field of the oneof
    )


def published(one: pb.MarketEvent, time_ns: int) -> pb.MarketEvent:
    one.publish_time_ns = time_ns
    return one


def received(one: pb.MarketEvent, time_ns: int) -> pb.MarketEvent:
    one.receive_time_ns = time_ns
    return one


def snapshot(time_ns: int, update_id: int, bids: Side, asks: Side) -> pb.MarketEvent:
    body = pb.BookSnapshot(
        last_update_id=update_id, bid_ticks=bids, bid_lots=bids.values(), ask_ticks=asks, ask_lots=asks.values()
    )
    return event(time_ns, snapshot=body)


def delta(time_ns: int, first: int, last: int, bids: Side, asks: Side) -> pb.MarketEvent:
    body = pb.BookDelta(
        first_update_id=first,
        last_update_id=last,
        bid_ticks=bids,
        bid_lots=bids.values(),
        ask_ticks=asks,
        ask_lots=asks.values(),
    )
    return event(time_ns, delta=body)


def quote(time_ns: int, update_id: int, bid: tuple[int, int], ask: tuple[int, int]) -> pb.MarketEvent:
    body = pb.Quote(update_id=update_id, bid_ticks=bid[0], bid_lots=bid[1], ask_ticks=ask[0], ask_lots=ask[1])
    return event(time_ns, quote=body)


def trade(time_ns: int, trade_id: int, ticks: int, lots: int, side: pb.TakerSide.ValueType) -> pb.MarketEvent:
    return event(time_ns, trade=pb.Trade(trade_id=trade_id, price_ticks=ticks, lots=lots, taker_side=side))


def reset(time_ns: int) -> pb.MarketEvent:
    return event(time_ns, reset=pb.BookReset(reason="test"))


# The engine against the definitions. ----------------------------------------------------------------------------------


def assert_same(found: FeatureSnapshot, history: History, index: int, now: int | None = None) -> None:
    state = history.states[index]
    expected = history.features(index, now)
    if not np.allclose(found.values, expected, rtol=2e-6, atol=1e-9, equal_nan=True):
        for name, value, wanted in zip(features.NAMES, found.values, expected, strict=True):
            assert value == pytest.approx(wanted, rel=2e-6, abs=1e-9, nan_ok=True), f"{name} after event {index}"
    best = state.best
    assert (found.state is BookState.UNKNOWN) == (best is None)
    assert (found.state is BookState.LOCKED) == (best is not None and best[0] == best[2])
    assert found.event_time_ns == (state.time if now is None else now)


# Random markets: a real book behind them, seen through lost, repeated and late messages. ------------------------------

STEPS: Final = st.sampled_from((0, 0, 0, 1, 7, 50, 99, 100, 101, 900, 1000, 4000, 9000, 26_000, 130_000))
OFF_MS: Final = st.sampled_from((0,) * 12 + (-1, -3, 40, 900, -900, 1_100, 3_600_000, -9_000, -15_000))
"""How far the exchange's clock is off, from message to message: out of order, ahead, far behind."""
LEVELS: Final = st.dictionaries(st.integers(94, 106), st.integers(0, 4), max_size=4)


@st.composite
def markets(draw: st.DrawFn) -> list[pb.MarketEvent]:
    now, update_id, trade_id, sent = START, 100, 0, 100
    bids: Side = {98: 2, 97: 1}
    asks: Side = {102: 1, 103: 5}
    events: list[pb.MarketEvent] = []
    if draw(st.booleans()):
        events.append(snapshot(now, update_id, bids, asks))
    kinds = (
        "delta",
        "delta",
        "delta",
        "quote",
        "quote",
        "trade",
        "trade",
        "snapshot",
        "lost",
        "again",
        "reset",
        "wild",
    )
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=40)):
        now += draw(STEPS) * MS
        time = now + draw(OFF_MS) * MS
        count = len(events)
        if kind in ("delta", "lost"):
            changed_bids = {p: q for p, q in draw(LEVELS).items() if p <= draw(st.sampled_from((99, 101, 106)))}
            changed_asks = {p: q for p, q in draw(LEVELS).items() if p >= draw(st.sampled_from((101, 99, 94)))}
            bids |= changed_bids
            asks |= changed_asks
            update_id += draw(st.integers(1, 3))
            if kind == "delta":
                events.append(delta(time, sent + 1, update_id, changed_bids, changed_asks))
            sent = update_id
        elif kind == "quote":
            update_id += draw(st.integers(0, 1))
            bid = draw(st.tuples(st.integers(95, 101), st.integers(0, 4)))
            ask = draw(st.tuples(st.integers(99, 105), st.integers(0, 4)))
            events.append(quote(time, update_id, bid, ask))
        elif kind == "trade":
            trade_id += draw(st.integers(0, 2))
            side = draw(st.sampled_from((pb.TAKER_SIDE_BUY, pb.TAKER_SIDE_SELL, pb.TAKER_SIDE_UNSPECIFIED)))
            events.append(trade(time, max(1, trade_id), draw(st.integers(95, 105)), draw(st.integers(1, 9)), side))
        elif kind in ("snapshot", "wild"):
            late = draw(st.integers(0, 2)) if kind == "wild" else 0
            events.append(snapshot(time, max(1, sent - late), {p: q for p, q in bids.items() if q}, asks))
        elif kind == "again":
            events += [copy.deepcopy(draw(st.sampled_from(events[-3:])))] if events else []
        elif kind == "reset":
            events.append(reset(time))
        for one in events[count:]:
            one.receive_time_ns = now + LATENCY
            one.event_time_estimated = draw(st.integers(0, 9)) == 0
    return events


@settings(max_examples=300)
@given(markets().filter(bool), st.integers(0, 40_000))
def test_features_are_those_of_the_definitions_after_every_event(events: list[pb.MarketEvent], later_ms: int) -> None:
    engine, history = FeatureEngine(NAME), History(events)
    for index, one in enumerate(events):
        engine.on_event(one)
        assert_same(engine.snapshot(), history, index)
    now = history.states[-1].time + later_ms * MS
    assert_same(engine.snapshot(now), history, len(events) - 1, now)


def test_features_are_those_of_the_definitions_in_a_simulated_market() -> None:
    events = list(simulate(3, ["BTCUSDT.SIM"], events_per_second=40, duration_seconds=45))
    engine, history = FeatureEngine("BTCUSDT.SIM"), History(events)
    for index, one in enumerate(events):
        engine.on_event(one)
        assert_same(engine.snapshot(), history, index)
    assert np.isfinite(engine.snapshot().values).all(), "45 s are enough for every window"


@pytest.mark.long
@pytest.mark.skipif(not DATA.is_dir(), reason="the recorded sessions are not there")
@pytest.mark.parametrize("symbol", ["BTCUSDT", "ETHUSDT"])
def test_features_are_those_of_the_definitions_at_every_event_of_a_recorded_minute(symbol: str) -> None:
    name = f"{symbol}.BINANCE"
    events = read_session(session_files([DATA]), {name})
    first = next(events)
    minute = [first, *itertools.takewhile(lambda one: one.receive_time_ns < first.receive_time_ns + 61 * 10**9, events)]
    engine, history = FeatureEngine(name), History(minute)
    for index, one in enumerate(minute):
        engine.on_event(one)
        assert_same(engine.snapshot(), history, index)
    assert len(minute) > 6_000
    assert np.isfinite(engine.snapshot().values).all()


def test_features_do_not_depend_on_how_often_one_looks() -> None:
    seldom, often = FeatureEngine("BTCUSDT.SIM"), FeatureEngine("BTCUSDT.SIM")
    for one in simulate(4, ["BTCUSDT.SIM"], duration_seconds=32):
        seldom.on_event(one)
        often.on_event(one)
        often.snapshot()
    np.testing.assert_array_equal(seldom.snapshot().values, often.snapshot().values)


# Rules one at a time. -------------------------------------------------------------------------------------------------


def value(engine: FeatureEngine, name: str) -> float:
    return float(engine.snapshot().values[features.INDEX[name]])


def known() -> FeatureEngine:
    engine = FeatureEngine(NAME)
    engine.on_event(snapshot(START, 10, {99: 5, 98: 7}, {101: 3, 102: 4}))
    return engine


def test_nothing_is_known_before_the_snapshot() -> None:
    engine = FeatureEngine(NAME)
    assert engine.snapshot().state is BookState.UNKNOWN
    engine.on_event(quote(START, 5, (99, 1), (101, 1)))
    engine.on_event(trade(START, 1, 100, 1, pb.TAKER_SIDE_BUY))
    found = engine.snapshot()
    assert found.state is BookState.UNKNOWN
    assert np.isnan(found.values).all()
    assert math.isnan(found.bid)


def test_a_gap_makes_the_instrument_unknown_and_gives_no_order_flow_when_it_ends() -> None:
    engine = known()
    engine.on_event(delta(START + MS, 15, 16, {99: 50}, {}))
    assert engine.snapshot().state is BookState.UNKNOWN
    engine.on_event(snapshot(START + 2 * MS, 20, {99: 70}, {101: 3}))
    assert engine.snapshot().state is BookState.VALID
    assert value(engine, "ofi_1s") == 0.0
    engine.on_event(delta(START + 3 * MS, 21, 21, {99: 71}, {}))
    assert value(engine, "ofi_1s") == pytest.approx(1 / ((71 + 3) / 2))


def test_returns_and_volatility_do_not_bridge_a_gap_and_are_undefined_until_their_window_is_full_again() -> None:
    engine = known()
    engine.on_event(delta(START + 2_000 * MS, 11, 11, {99: 6}, {}))
    of_mids = ("ret_1s_bps", "rv_1s_bps")
    assert [value(engine, name) for name in of_mids] == [0.0, 0.0]
    engine.on_event(delta(START + 2_100 * MS, 15, 16, {99: 50}, {}))
    engine.on_event(snapshot(START + 2_900 * MS, 20, {199: 70}, {201: 3}))  # the price doubled while nobody looked
    assert all(math.isnan(value(engine, name)) for name in of_mids)
    index = [features.INDEX[name] for name in of_mids]
    assert np.isnan(engine.snapshot(START + 3_899 * MS).values[index]).all()
    assert engine.snapshot(START + 4_000 * MS).values[index].tolist() == [0.0, 0.0]


def test_a_newer_quote_stands_for_the_best_level_until_the_book_has_caught_up() -> None:
    engine = known()
    engine.on_event(quote(START + MS, 12, (100, 2), (101, 3)))
    assert (engine.snapshot().bid, engine.snapshot().ask) == (1.0, 1.01)
    engine.on_event(delta(START + 2 * MS, 11, 11, {97: 1}, {}))
    assert engine.snapshot().bid == 1.0, "the book is still older than the quote"
    engine.on_event(delta(START + 3 * MS, 12, 13, {100: 0}, {}))
    assert engine.snapshot().bid == 0.99


def test_a_crossed_quote_makes_the_instrument_unknown_until_the_next_sound_one() -> None:
    engine = known()
    engine.on_event(quote(START + MS, 12, (102, 2), (101, 3)))
    assert engine.snapshot().state is BookState.UNKNOWN
    engine.on_event(quote(START + MS, 13, (100, 2), (101, 3)))
    assert engine.snapshot().state is BookState.VALID


def test_a_missing_side_is_undefined_and_never_zero() -> None:
    engine = known()
    engine.on_event(delta(START + MS, 11, 11, {99: 0, 98: 0}, {}))
    found = engine.snapshot()
    assert found.state is BookState.VALID
    assert math.isnan(found.bid)
    assert found.ask == 1.01
    for name in ("spread_bps", "imbalance_l1", "imbalance_l5", "depth_l5_notional_bid", "weighted_mid_bps"):
        assert math.isnan(value(engine, name)), name
    assert value(engine, "depth_l5_notional_ask") > 0


def test_realised_volatility_needs_a_mid_at_every_grid_point_of_its_window() -> None:
    engine = FeatureEngine(NAME)
    engine.on_event(snapshot(START + 50 * MS, 10, {99: 5}, {101: 3}))  # the first mid is that of the grid point 100
    index = features.INDEX["rv_1s_bps"]
    assert math.isnan(engine.snapshot(START + 1_099 * MS).values[index])
    assert engine.snapshot(START + 1_100 * MS).values[index] == 0.0


def test_a_trade_that_comes_twice_counts_once() -> None:
    engine = known()
    for _ in range(2):
        engine.on_event(trade(START + MS, 7, 100, 1, pb.TAKER_SIDE_BUY))
    assert value(engine, "trade_rate_1s") == 1.0
    assert engine.stale == 1


def test_an_event_from_the_future_counts_as_a_second_ahead_of_its_feed() -> None:
    engine = known()
    wrong = trade(START + 3600 * 1000 * MS, 1, 100, 1, pb.TAKER_SIDE_BUY)
    wrong.receive_time_ns = START + 5 * MS + LATENCY
    engine.on_event(wrong)
    assert engine.future == 1
    assert engine.snapshot().event_time_ns == START + 1005 * MS
    engine.on_event(trade(START + 2000 * MS, 2, 100, 1, pb.TAKER_SIDE_BUY))
    assert engine.snapshot().event_time_ns == START + 2000 * MS


def test_the_book_is_unknown_and_windows_begin_anew_when_event_time_has_run_far_back() -> None:
    engine = known()
    engine.on_event(trade(START + 1, 1, 100, 1, pb.TAKER_SIDE_BUY))
    back = START - 60_000 * MS
    engine.on_event(trade(back, 2, 100, 1, pb.TAKER_SIDE_BUY))
    found = engine.snapshot()
    assert (engine.time_restarts, found.event_time_ns, found.book_time_ns) == (1, back, 0)
    assert found.state is BookState.UNKNOWN
    engine.on_event(snapshot(back + MS, 20, {99: 5}, {101: 3}))
    assert engine.state is BookState.VALID
    assert value(engine, "trade_rate_5s") == pytest.approx(0.2)
    assert value(engine, "book_age_ms") == 0.0


def test_a_late_duplicate_does_not_turn_time_back() -> None:
    engine = known()
    engine.on_event(delta(START + 20_000 * MS, 11, 11, {99: 6}, {}))
    engine.on_event(delta(START, 9, 10, {99: 5}, {}))
    assert engine.time_restarts == 0
    assert engine.snapshot().event_time_ns == START + 20_000 * MS


def test_transit_is_the_time_beyond_the_fastest_message() -> None:
    engine = known()
    slow = delta(START + 100 * MS, 11, 11, {99: 6}, {})
    slow.receive_time_ns += 40 * MS
    engine.on_event(slow)
    assert engine.snapshot().transit_ns == 40 * MS
    estimated = quote(START + 150 * MS, 12, (99, 1), (101, 1))
    estimated.event_time_estimated = True
    engine.on_event(estimated)
    assert engine.snapshot().transit_ns == 40 * MS, "an estimated time shows no transit of its own"


@pytest.mark.parametrize(
    ("lag_seconds", "transit_seconds"),
    [(-3600.0, 0.0), (-1.27, 0.0), (0.03, 0.0), (0.5, 0.0), (0.6, 0.1), (30.0, 29.5)],
)
def test_a_steady_lag_is_laid_to_the_clocks_only_within_a_bound(lag_seconds: float, transit_seconds: float) -> None:
    engine = FeatureEngine(NAME)
    for number in range(10):
        one = delta(START + number * MS, 11 + number, 11 + number, {99: 6}, {})
        one.receive_time_ns = one.publish_time_ns = one.event_time_ns + round(lag_seconds * 1e9)
        engine.on_event(one)
    assert engine.snapshot().transit_ns == pytest.approx(transit_seconds * 1e9)
    assert engine.age_seconds(one.publish_time_ns) == pytest.approx(transit_seconds)


def test_sequence_and_publish_time_follow_the_events() -> None:
    engine = FeatureEngine(NAME)
    engine.on_event(snapshot(START, 10, {99: 5}, {101: 3}))
    engine.on_event(reset(START + MS))
    found = engine.snapshot()
    assert found.state is BookState.UNKNOWN
    assert found.sequence == found.publish_time_ns == START + MS + LATENCY


@given(st.lists(st.integers(-5_000, 5_000), min_size=2, max_size=40), st.data())
def test_sequences_grow_whatever_the_publishers_clock_does(steps_ms: list[int], data: st.DataObject) -> None:
    engine, later = FeatureEngine(NAME), FeatureEngine(NAME)
    began = data.draw(st.integers(0, len(steps_ms) - 1))
    times = list(itertools.accumulate((step * MS for step in steps_ms), initial=START))
    sequences = []
    for number, time_ns in enumerate(times):
        one = published(snapshot(START, 10, {99: 5}, {101: 3}), time_ns)
        for each in (engine, later) if number >= began else (engine,):
            each.on_event(one)
        sequences.append(engine.snapshot().sequence)
    assert all(one < next_ for one, next_ in itertools.pairwise(sequences))
    if times.index(max(times)) >= began:
        assert later.snapshot().sequence == sequences[-1], "who read the latest-published event agrees on what follows"


@pytest.mark.parametrize(
    ("broken", "field_name"),
    [
        (event(START), "event"),
        (snapshot(0, 10, {}, {}), "event_time_ns"),
        (snapshot(START, 0, {}, {}), "snapshot.last_update_id"),
        (snapshot(START, 1, {-5: 1}, {}), "snapshot.bid_ticks"),
        (delta(START, 11, 10, {}, {}), "delta.last_update_id"),
        (delta(START, 11, 11, {}, {101: -1}), "delta.ask_lots"),
        (event(START, delta=pb.BookDelta(first_update_id=11, last_update_id=11, bid_ticks=[1])), "delta.bid_lots"),
        (quote(START, 0, (99, 1), (101, 1)), "quote.update_id"),
        (quote(START, 11, (-1, 1), (101, 1)), "quote.bid_ticks"),
        (quote(START, 11, (99, 1), (101, -1)), "quote.ask_lots"),
        (trade(START, 0, 100, 1, pb.TAKER_SIDE_BUY), "trade.trade_id"),
        (trade(START, 1, 0, 1, pb.TAKER_SIDE_BUY), "trade.price_ticks"),
        (trade(START, 1, 100, 0, pb.TAKER_SIDE_BUY), "trade.lots"),
        (pb.MarketEvent(instrument="OTHER.TEST"), "instrument"),
        (published(event(START, reset=pb.BookReset()), (1 << 63) - 1), "publish_time_ns"),
        (event((1 << 63) - 1 - LATENCY, reset=pb.BookReset()), "event_time_ns"),
        (received(snapshot(START, 11, {}, {}), (1 << 63) - 1), "receive_time_ns"),
    ],
)
def test_an_event_that_breaks_the_contract_changes_nothing(broken: pb.MarketEvent, field_name: str) -> None:
    engine = known()
    before = engine.snapshot()
    with pytest.raises(EventError) as caught:
        engine.on_event(broken)
    assert caught.value.field == field_name
    after = engine.snapshot()
    np.testing.assert_array_equal(after.values, before.values)
    assert (after.sequence, after.state, engine.events) == (before.sequence, before.state, 1)


INT64: Final = st.one_of(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(1, 200_000_000_000))


@given(st.lists(st.tuples(INT64, INT64, INT64), min_size=1, max_size=8))
@example([((1 << 63) - 1, 1, 1), (1, 60_000_000_000, 1)])  # a transit beyond 64 bits, which cannot be packed
def test_whatever_the_clocks_say_an_event_is_refused_or_its_features_can_be_packed(
    times: list[tuple[int, int, int]],
) -> None:
    engine = FeatureEngine(NAME)
    for number, (event_time_ns, receive_time_ns, publish_time_ns) in enumerate(times, start=1):
        one = published(received(snapshot(START, number, {99: 5}, {101: 3}), receive_time_ns), publish_time_ns)
        one.event_time_ns = event_time_ns
        with contextlib.suppress(EventError):
            engine.on_event(one)
        assert decode(encode(engine.snapshot())).transit_ns >= 0


def test_decimals_may_change_only_with_a_reset() -> None:
    engine = known()
    other = snapshot(START + MS, 20, {9: 5}, {11: 3})
    other.price_decimals = 1
    with pytest.raises(EventError, match="price_decimals"):
        engine.on_event(other)
    engine.on_event(reset(START + MS))
    engine.on_event(other)
    assert engine.snapshot().bid == 0.9
