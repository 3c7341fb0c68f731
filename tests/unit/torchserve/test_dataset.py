"""Samples hold what was known at the instant, and labels what came of it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from feature_cache import features
from feature_cache.sources.simulator import simulate
from pretrade.market.v1 import market_pb2 as pb
from torchserve.dataset import STEP_NS, Market, collect
from torchserve.label import STUDIED, TICK_NS, Label

INSTRUMENT = "BTCUSDT.SIM"
LABEL_HORIZON_NS = Label().span_ns


@pytest.fixture(scope="module")
def market(events: list[pb.MarketEvent]) -> Market:
    return Market(events, "test")


@pytest.fixture(scope="module")
def events() -> list[pb.MarketEvent]:
    return list(simulate(11, [INSTRUMENT], duration_seconds=28))


def known_mid(events: list[pb.MarketEvent], time_ns: int) -> Fraction | None:
    """Mid of the last quote received before the first event at `time_ns` or later; None without one."""
    mid = None
    for event in events:
        if event.event_time_ns >= time_ns:
            return mid
        if event.WhichOneof("event") == "quote":
            mid = Fraction(event.quote.bid_ticks + event.quote.ask_ticks, 2)
    return None


def known_quote(events: list[pb.MarketEvent], time_ns: int) -> tuple[int, int] | None:
    """Bid and ask of the last quote received before the first event at `time_ns` or later."""
    known = None
    for event in events:
        if event.event_time_ns >= time_ns:
            return known
        if event.WhichOneof("event") == "quote":
            known = event.quote.bid_ticks, event.quote.ask_ticks
    return None


def test_labels_equal_a_slow_direct_computation(events: list[pb.MarketEvent]) -> None:
    samples = collect(events, "test")
    assert len(samples.rows) > 150
    compared = 0
    for index in range(0, len(samples.rows), 2):
        time = int(samples.time_ns[index])
        now, later = known_mid(events, time), known_mid(events, time + LABEL_HORIZON_NS)
        if now is None:
            continue
        assert later is not None
        move = 10_000 * (later / now - 1)
        assert samples.time_ns[index + 1] == time
        assert samples.markout_bps[index] == pytest.approx(float(move), abs=1e-7)
        assert samples.markout_bps[index + 1] == pytest.approx(-float(move), abs=1e-7)
        assert samples.eligible[index] == (move >= -1)
        assert samples.eligible[index + 1] == (-move >= -1)
        compared += 1
    assert compared > 75
    assert samples.eligible.any()
    assert not samples.eligible.all()


@pytest.mark.parametrize("price", ["mid", "touch"])
@pytest.mark.parametrize(("horizon", "delay"), [(0.5, 0.0), (1.0, 0.2), (5.0, 0.3)])
def test_any_label_equals_a_slow_direct_computation(
    horizon: float, delay: float, price: str, events: list[pb.MarketEvent], market: Market
) -> None:
    label = Label.model_validate({"horizon_seconds": horizon, "delay_seconds": delay, "price": price})
    samples = market.samples(label)
    assert samples.label == label
    compared = 0
    for index in range(0, len(samples.rows), 7):
        at = int(samples.time_ns[index]) + round(delay * 1e9)
        quote, later = known_quote(events, at), known_mid(events, at + round(horizon * 1e9))
        assert quote is not None
        assert later is not None
        bid, ask = quote
        is_sell = bool(samples.sell[index])
        done = (bid if is_sell else ask) if price == "touch" else Fraction(bid + ask, 2)
        move = float(10_000 * (later / done - 1)) * (-1 if is_sell else 1)
        # The spread is a float32 of the feature vector.
        assert samples.markout_bps[index] == pytest.approx(move, abs=1e-5)
        assert samples.eligible[index] == (samples.markout_bps[index] >= -1)
        compared += 1
    assert compared > 25


def test_a_label_that_looks_less_far_has_more_samples_and_the_same_rows(market: Market) -> None:
    near, far = market.samples(STUDIED[0]), market.samples(STUDIED[-1])
    assert near.label.span_ns < far.label.span_ns
    assert len(near.rows) > len(far.rows) > 100
    np.testing.assert_array_equal(near.rows[: len(far.rows)], far.rows)


def test_a_label_looks_at_whole_ticks() -> None:
    with pytest.raises(ValueError, match="whole number of 100 ms"):
        Label(horizon_seconds=0.25)
    assert Label(horizon_seconds=0.3, delay_seconds=0.2).span_ticks == 5
    assert "0.2 s after the decision" in Label(delay_seconds=0.2).text


def test_every_instant_of_the_grid_with_a_whole_horizon_gives_a_buy_and_a_sell(events: list[pb.MarketEvent]) -> None:
    samples = collect(events, "test")
    buys, sells = samples.time_ns[0::2], samples.time_ns[1::2]
    assert (buys == sells).all()
    assert (np.diff(buys) == STEP_NS).all()
    assert (buys % STEP_NS == 0).all()
    last = events[-1].event_time_ns
    assert last - LABEL_HORIZON_NS - STEP_NS < buys[-1] <= last - LABEL_HORIZON_NS
    np.testing.assert_array_equal(samples.rows[1::2], features.MF1.for_sell(samples.rows[0::2]))


def test_a_sample_knows_nothing_of_the_future(events: list[pb.MarketEvent]) -> None:
    whole = collect(events, "test")
    for cut in (len(events) // 3, len(events) // 2, len(events) - 1):
        part = collect(events[:cut], "test")
        n = len(part.rows)
        assert n > 0
        np.testing.assert_array_equal(part.rows, whole.rows[:n])
        np.testing.assert_array_equal(part.eligible, whole.eligible[:n])


def test_ages_run_until_the_instant(events: list[pb.MarketEvent]) -> None:
    samples = collect(events, "test")
    trades = np.array([event.event_time_ns for event in events if event.WhichOneof("event") == "trade"])
    column = features.INDEX["trade_age_ms"]
    checked = 0
    for row, time in zip(samples.rows[0::2], samples.time_ns[0::2], strict=True):
        before = trades[trades < time]
        if len(before) and not np.isnan(row[column]):
            assert row[column] == pytest.approx((time - before[-1]) / 1e6, abs=0.01)
            checked += 1
    assert checked > 75


def test_instants_while_the_book_is_unknown_or_old_are_left_out(events: list[pb.MarketEvent]) -> None:
    start = events[0].event_time_ns
    silence = (start + 8_000_000_000, start + 14_000_000_000)
    kept = [event for event in events if not silence[0] <= event.event_time_ns < silence[1]]
    samples = collect(kept, "test")
    # The book is older than 2 s from 10 s on; the deltas lost make it unknown until the snapshot at 20 s.
    forbidden = (start + 10_200_000_000, start + 20_000_000_000)
    for lookahead in (0, LABEL_HORIZON_NS):
        instants = samples.time_ns + lookahead
        assert not ((instants > forbidden[0]) & (instants < forbidden[1])).any()
    assert (samples.time_ns < forbidden[0]).any()
    assert (samples.time_ns > forbidden[1]).any()


def test_a_session_shorter_than_the_horizon_gives_nothing() -> None:
    samples = collect(simulate(1, [INSTRUMENT], duration_seconds=4), "test")
    assert samples.rows.shape == (0, features.N_FEATURES)


def test_instruments_are_merged_in_time_order_whatever_comes_first() -> None:
    both = ["BTCUSDT.SIM", "ETHUSDT.SIM"]
    events = list(simulate(2, both, duration_seconds=10))
    merged = collect(events, "test")
    assert (np.diff(merged.time_ns) >= 0).all()
    alone = [collect([event for event in events if event.instrument == name], "test") for name in both]
    assert len(merged.rows) == sum(len(one.rows) for one in alone)
    assert {row.tobytes() for row in merged.rows} == {row.tobytes() for one in alone for row in one.rows}


def test_the_hash_follows_what_can_be_learnt(events: list[pb.MarketEvent]) -> None:
    samples = collect(events, "a")
    assert samples.sha256() == collect(events, "b").sha256()
    assert samples.sha256() != collect(events[:-400], "a").sha256()


@pytest.mark.parametrize("ahead_seconds", [3_600, 75 * 365 * 86_400])
def test_a_timestamp_far_ahead_makes_no_instants_and_loses_no_instrument(
    events: list[pb.MarketEvent], ahead_seconds: int
) -> None:
    """A server counts such an event a second ahead of its feed, and so does training."""
    whole = collect(events, "test")
    middle = len(events) // 2
    wrong = pb.MarketEvent.FromString(events[middle].SerializeToString())
    wrong.event_time_ns += ahead_seconds * 1_000_000_000
    samples = collect([*events[:middle], wrong, *events[middle + 1 :]], "test")
    assert len(whole.rows) - 20 <= len(samples.rows) <= len(whole.rows)
    assert samples.time_ns.max() == whole.time_ns.max()


def test_a_first_timestamp_from_the_future_loses_nothing_but_its_own_time(events: list[pb.MarketEvent]) -> None:
    wrong = pb.MarketEvent(
        instrument=INSTRUMENT,
        price_decimals=events[0].price_decimals,
        size_decimals=events[0].size_decimals,
        event_time_ns=events[0].event_time_ns + 3_600_000_000_000,
        receive_time_ns=events[0].receive_time_ns,
        publish_time_ns=events[0].publish_time_ns,
        trade=pb.Trade(trade_id=1, price_ticks=1, lots=1, taker_side=pb.TAKER_SIDE_BUY),
    )
    samples = collect([wrong, *events], "test")
    # Where time ran back the book is unknown until the next snapshot, ten seconds later.
    assert samples.time_ns.max() == collect(events, "test").time_ns.max()
    assert (samples.time_ns < events[0].event_time_ns + 30_000_000_000).all()


def test_a_silence_of_years_between_two_sessions_has_no_instants(events: list[pb.MarketEvent]) -> None:
    whole = collect(events, "test")
    years = 50 * 365 * 86_400 * 1_000_000_000
    later = []
    for event in events:
        moved = pb.MarketEvent.FromString(event.SerializeToString())
        moved.event_time_ns += years
        moved.receive_time_ns += years
        moved.publish_time_ns += years
        later.append(moved)
    reset = pb.MarketEvent(
        instrument=INSTRUMENT,
        event_time_ns=later[0].event_time_ns,
        receive_time_ns=later[0].receive_time_ns,
        publish_time_ns=later[0].publish_time_ns,
        reset=pb.BookReset(reason="reconnect"),
    )
    samples = collect([*events, reset, *later], "test")
    # Besides, horizons end up to 2 s after the last event, while its book counts: ten instants, both sides.
    assert len(samples.rows) == pytest.approx(2 * len(whole.rows) + 2 * 10, abs=4)
    assert (samples.time_ns > years).any()


def test_books_that_a_server_refuses_are_not_learnt_from() -> None:
    # Whole books, so that what comes after the silence is known: without events in between it would not be.
    start = 1_700_000_000_000_000_000
    silence = (start + 8_000_000_000, start + 9_800_000_000)
    times = [start + number * TICK_NS for number in range(200)]
    events = [
        pb.MarketEvent(
            instrument=INSTRUMENT,
            price_decimals=2,
            size_decimals=3,
            event_time_ns=time,
            receive_time_ns=time,
            publish_time_ns=time,
            snapshot=pb.BookSnapshot(
                last_update_id=number + 1, bid_ticks=[9999], bid_lots=[5], ask_ticks=[10001], ask_lots=[5]
            ),
        )
        for number, time in enumerate(times)
        if not silence[0] <= time < silence[1]
    ]
    samples = collect(events, "test")
    ages = samples.rows[:, features.INDEX["book_age_ms"]]
    assert 800 <= ages.max() <= 1_000, "of the silence's instants those at which a server would decide"
    # A label may end where the book is older: the sample at 4.2 s ends 1.2 s into the silence.
    ends = samples.time_ns + LABEL_HORIZON_NS
    assert ((ends > silence[0] + 1_000_000_000) & (ends < silence[1])).any()
