"""The engine against an independent computation over the whole history, straight from the definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_cache import features
from feature_cache.book import EventError
from feature_cache.codec import BookState, FeatureSnapshot
from feature_cache.engine import FeatureEngine
from feature_cache.session import read_session, session_files
from feature_cache.simulator import simulate
from pretrade.market.v1 import market_pb2 as pb

DATA: Final = Path(__file__).parents[3] / ".." / "shared" / "data" / "binance_spot"
NAME: Final = "BTCUSDT.TEST"
START: Final = 1_700_000_000_000_000_000
MS: Final = 1_000_000
LATENCY: Final = 3 * MS
Side = dict[int, int]
Best = tuple[float, int, float, int]


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


# The reference: keeps everything, and computes every feature from all of it. -----------------------------------------


@dataclass
class Reference:
    """Books are rebuilt from the deltas, best levels listed, and each feature computed from the lists."""

    snapshot: pb.BookSnapshot | None = None
    deltas: list[pb.BookDelta] = field(default_factory=list)
    bids: Side = field(default_factory=dict)
    asks: Side = field(default_factory=dict)
    book_id: int = 0
    quote: pb.Quote | None = None
    time: int = 0
    book_time: int = 0
    trade_time: int = 0
    trade_id: int = 0
    top: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    best: list[tuple[int, Best | None]] = field(default_factory=list)
    trades: list[tuple[int, int, int, int]] = field(default_factory=list)
    decimals: tuple[int, int] = (0, 0)

    def take(self, event: pb.MarketEvent) -> None:
        if event.HasField("reset"):
            self.__init__()  # type: ignore[misc]  # everything anew
            self.time = event.event_time_ns
            return
        if event.HasField("quote") and self.quote and event.quote.update_id <= self.quote.update_id:
            return
        if event.HasField("trade") and event.trade.trade_id <= self.trade_id:
            return
        if event.HasField("delta") and self.snapshot and event.delta.last_update_id <= self.book_id:
            return
        if event.HasField("snapshot") and self.snapshot and event.snapshot.last_update_id <= self.book_id:
            return
        self.time = max(self.time, event.event_time_ns)
        self.decimals = (event.price_decimals, event.size_decimals)
        if event.HasField("trade"):
            taken = event.trade
            self.trade_id, self.trade_time = taken.trade_id, self.time
            self.trades.append((self.time, taken.price_ticks, taken.lots, taken.taker_side))
            return
        if event.HasField("quote"):
            self.quote = event.quote
            self.book_time = self.time
        elif event.HasField("snapshot"):
            self._take_snapshot(event.snapshot)
        else:
            self._take_delta(event.delta)
        self.best.append((self.time, self._best()))

    def _take_snapshot(self, snapshot: pb.BookSnapshot) -> None:
        waiting = [] if self.snapshot else [d for d in self.deltas if d.last_update_id > snapshot.last_update_id]
        if waiting and waiting[0].first_update_id > snapshot.last_update_id + 1:
            return
        self.snapshot, self.deltas = snapshot, []
        self.bids = dict(zip(snapshot.bid_ticks, snapshot.bid_lots, strict=True))
        self.asks = dict(zip(snapshot.ask_ticks, snapshot.ask_lots, strict=True))
        self.book_id, self.book_time = snapshot.last_update_id, self.time
        self._drop_if_crossed()
        for change in waiting:
            self._take_delta(change)

    def _take_delta(self, change: pb.BookDelta) -> None:
        if self.snapshot is None:
            self.deltas.append(change)
            return
        self.book_time = self.time
        if change.first_update_id > self.book_id + 1:
            self.snapshot, self.deltas = None, [change]
            return
        self.bids |= dict(zip(change.bid_ticks, change.bid_lots, strict=True))
        self.asks |= dict(zip(change.ask_ticks, change.ask_lots, strict=True))
        self.book_id = change.last_update_id
        self._drop_if_crossed()

    def _drop_if_crossed(self) -> None:
        bids, asks = self.top = (self._side(self.bids, -1)[:1], self._side(self.asks, 1)[:1])
        if bids and asks and bids[0][0] > asks[0][0]:
            self.snapshot, self.deltas = None, []

    @staticmethod
    def _side(levels: Side, sign: int) -> list[tuple[int, int]]:
        return sorted(((p, q) for p, q in levels.items() if q), key=lambda level: sign * level[0])

    def _best(self) -> Best | None:
        if self.snapshot is None:
            return None
        bids, asks = self.top
        if self.quote and self.quote.update_id > self.book_id:
            bids = [(self.quote.bid_ticks, self.quote.bid_lots)] if self.quote.bid_lots else []
            asks = [(self.quote.ask_ticks, self.quote.ask_lots)] if self.quote.ask_lots else []
        (bid, bid_lots), (ask, ask_lots) = (*bids, (-math.inf, 0))[0], (*asks, (math.inf, 0))[0]
        return None if bid > ask else (bid, bid_lots, ask, ask_lots)

    def features(self, now: int) -> dict[str, float]:
        best = self.best[-1][1] if self.best else None
        if best is None:
            return dict.fromkeys(features.NAMES, math.nan)
        nan = math.nan
        out: dict[str, float] = {}
        bid, bid_lots, ask, ask_lots = best
        both = bool(bid_lots and ask_lots)
        mid = (bid + ask) / 2 if both else nan
        share = bid_lots / (bid_lots + ask_lots) if both else nan
        weighted = ask * share + bid * (1 - share) if both else nan
        out["spread_bps"] = 1e4 * (ask - bid) / mid if both else nan
        out["weighted_mid_bps"] = 1e4 * (weighted - mid) / mid if both else nan
        out["imbalance_l1"] = (bid_lots - ask_lots) / (bid_lots + ask_lots) if both else nan
        bids, asks = self._side(self.bids, -1), self._side(self.asks, 1)
        for k in (5, 10):
            b, a = sum(q for _, q in bids[:k]), sum(q for _, q in asks[:k])
            out[f"imbalance_l{k}"] = (b - a) / (b + a) if b and a else nan
        unit = 10.0 ** sum(self.decimals)
        out["depth_l5_notional_bid"] = sum(p * q for p, q in bids[:5]) / unit if bids else nan
        out["depth_l5_notional_ask"] = sum(p * q for p, q in asks[:5]) / unit if asks else nan
        self._flows(out, now)
        self._trades(out, now)
        self._mids(out, now, mid)
        out["book_age_ms"] = (now - self.book_time) / 1e6
        out["trade_age_ms"] = (now - self.trade_time) / 1e6 if self.trade_time else nan
        return out

    def _flows(self, out: dict[str, float], now: int) -> None:
        flows: list[tuple[int, int, float]] = []
        for index in range(1, len(self.best)):
            before: Best | None = self.best[index - 1][1]
            time, after = self.best[index]
            if before is None or after is None or before == after:
                continue
            (pb0, qb0, pa0, qa0), (pb1, qb1, pa1, qa1) = before, after
            e = (pb1 >= pb0) * qb1 - (pb1 <= pb0) * qb0 - (pa1 <= pa0) * qa1 + (pa1 >= pa0) * qa0
            flows.append((time, e, (qb1 + qa1) / 2))
        for name, width in (("ofi_100ms", 100), ("ofi_1s", 1000), ("ofi_5s", 5000)):
            inside = [(e, d) for t, e, d in flows if now - width * MS < t <= now]
            depth = np.mean([d for _, d in inside]) if inside else 1.0
            out[name] = float(sum(e for e, _ in inside) / depth) if depth else math.nan

    def _trades(self, out: dict[str, float], now: int) -> None:
        for seconds in (1, 5):
            inside = [(q, s) for t, _, q, s in self.trades if now - seconds * 1000 * MS < t <= now]
            buys = sum(q for q, s in inside if s == pb.TAKER_SIDE_BUY)
            sells = sum(q for q, s in inside if s == pb.TAKER_SIDE_SELL)
            out[f"trade_imbalance_{seconds}s"] = (buys - sells) / (buys + sells) if buys + sells else 0.0
            out[f"trade_rate_{seconds}s"] = len(inside) / seconds
        returns = np.diff(np.log([float(p) for _, p, _, _ in self.trades]))[-50:]
        out["n_50"] = len(returns)
        out["ret_mean_50"] = float(returns.mean()) if len(returns) else math.nan
        out["ret_std_50"] = float(returns.std(ddof=1)) if len(returns) > 1 else math.nan

    def _mids(self, out: dict[str, float], now: int, mid: float) -> None:
        history = [(t, (b[0] + b[2]) / 2) for t, b in self.best if b is not None and b[1] and b[3]]
        times, mids = np.array([t for t, _ in history]), np.array([m for _, m in history])

        def last(at: int) -> float:
            until = int(np.searchsorted(times, at, side="right"))
            return float(mids[until - 1]) if until else math.nan

        grid = 100 * MS
        for seconds in (1, 5, 30):
            width = seconds * 1000 * MS
            out[f"ret_{seconds}s_bps"] = 1e4 * math.log(mid / last(now - width))
            ends = [g * grid for g in range((now - width) // grid + 1, now // grid + 1)]
            squares = [math.log(last(g) / last(g - grid)) ** 2 for g in ends]
            assert len(squares) == seconds * 10
            out[f"rv_{seconds}s_bps"] = 1e4 * math.sqrt(sum(squares))


def assert_same(found: FeatureSnapshot, reference: Reference, now: int) -> None:
    expected = reference.features(now)
    for name, value in zip(features.NAMES, found.values, strict=True):
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-5, nan_ok=True), name
    best = reference.best[-1][1] if reference.best else None
    assert (found.state is BookState.UNKNOWN) == (best is None)
    assert (found.state is BookState.LOCKED) == (best is not None and best[0] == best[2])
    assert found.event_time_ns == now


# Random markets: a real book behind them, seen through lost, repeated and late messages. ------------------------------

STEPS: Final = st.sampled_from((0, 0, 0, 1, 7, 50, 99, 100, 101, 900, 1000, 4000, 9000, 26_000, -1, -3))
LEVELS: Final = st.dictionaries(st.integers(94, 106), st.integers(0, 4), max_size=4)


@st.composite
def markets(draw: st.DrawFn) -> list[pb.MarketEvent]:
    time, update_id, trade_id, sent = START, 100, 0, 100
    bids: Side = {98: 2, 97: 1}
    asks: Side = {102: 1, 103: 5}
    events: list[pb.MarketEvent] = []
    if draw(st.booleans()):
        events.append(snapshot(time, update_id, bids, asks))
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
        time += draw(STEPS) * MS
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
            recent = [one for one in events[-3:] if one.event_time_ns > time - 9_000 * MS]
            events += [draw(st.sampled_from(recent))] if recent else []
        elif kind == "reset":
            events.append(reset(time))
    return events


@settings(max_examples=300, deadline=None)
@given(markets(), st.integers(0, 3_000))
def test_features_are_those_of_the_definitions_after_every_event(events: list[pb.MarketEvent], later_ms: int) -> None:
    engine, reference = FeatureEngine(NAME), Reference()
    for one in events:
        engine.on_event(one)
        reference.take(one)
        assert_same(engine.snapshot(), reference, reference.time)
    now = reference.time + later_ms * MS
    assert_same(engine.snapshot(now), reference, now)


def test_features_are_those_of_the_definitions_in_a_simulated_market() -> None:
    engine, reference = FeatureEngine("BTCUSDT.SIM"), Reference()
    for number, one in enumerate(simulate(3, ["BTCUSDT.SIM"], events_per_second=40, duration_seconds=45)):
        engine.on_event(one)
        reference.take(one)
        if number % 97 == 0:
            assert_same(engine.snapshot(), reference, reference.time)
    found = engine.snapshot()
    assert_same(found, reference, reference.time)
    assert np.isfinite(found.values).all(), "45 s are enough for every window"


@pytest.mark.skipif(not DATA.is_dir(), reason="the recorded session is not there")
def test_features_are_those_of_the_definitions_in_a_recorded_minute() -> None:
    engine, reference = FeatureEngine("ETHUSDT.BINANCE"), Reference()
    files = [path for path in session_files([DATA]) if path.name.startswith("ethusdt")]
    for number, one in enumerate(read_session(files)):
        engine.on_event(one)
        reference.take(one)
        if number % 211 == 0:
            assert_same(engine.snapshot(), reference, reference.time)
        if reference.best and reference.time > reference.best[0][0] + 60_000 * MS:
            break
    found = engine.snapshot()
    assert_same(found, reference, reference.time)
    assert np.isfinite(found.values).all()


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


def test_windows_begin_anew_when_event_time_has_run_far_back() -> None:
    engine = known()
    engine.on_event(trade(START + 1, 1, 100, 1, pb.TAKER_SIDE_BUY))
    back = START - 60_000 * MS
    engine.on_event(trade(back, 2, 100, 1, pb.TAKER_SIDE_BUY))
    found = engine.snapshot()
    assert (engine.time_restarts, found.event_time_ns) == (1, back)
    assert value(engine, "trade_rate_5s") == pytest.approx(0.2)
    assert found.state is BookState.VALID, "the book goes by update ids"


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


def test_sequence_and_publish_time_follow_the_events() -> None:
    engine = FeatureEngine(NAME, first_sequence=1000)
    engine.on_event(snapshot(START, 10, {99: 5}, {101: 3}))
    engine.on_event(reset(START + MS))
    found = engine.snapshot()
    assert (found.sequence, found.state) == (1002, BookState.UNKNOWN)
    assert found.publish_time_ns == START + MS + LATENCY


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


def test_decimals_may_change_only_with_a_reset() -> None:
    engine = known()
    other = snapshot(START + MS, 20, {9: 5}, {11: 3})
    other.price_decimals = 1
    with pytest.raises(EventError, match="price_decimals"):
        engine.on_event(other)
    engine.on_event(reset(START + MS))
    engine.on_event(other)
    assert engine.snapshot().bid == 0.9
