from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from support import ta1_definitions
from support.plain_market import PlainMarket

from feature_cache.bars.bar import SECOND_NS, Bar, Lacks
from feature_cache.bars.maker import BarMaker
from feature_cache.engine.book import EventError
from feature_cache.sources.simulator import simulate
from feature_cache.ta1.computer import Board, Indicators, Pair, Ta1Computer
from feature_cache.ta1.definition import CROSS, TA1, TA1_LONG
from feature_cache.ta1.indicators import FEATURES
from feature_cache.ta1.registration import COMPUTED, COMPUTED_LONG, make
from feature_cache.ta1.series import Series
from pretrade.market.v1 import market_pb2 as pb

OURS, THEIRS = "ETHUSDT.SIM", "BTCUSDT.SIM"


@cache
def _recorded() -> tuple[bytes, ...]:
    both = simulate(2, [OURS, THEIRS], duration_seconds=50, events_per_second=30)
    return tuple(one.SerializeToString() for one in both)


def recorded() -> Iterator[pb.MarketEvent]:
    return map(pb.MarketEvent.FromString, _recorded())


def run(partner: str | None = THEIRS, partner_is_here: bool = True) -> list[NDArray[np.float32]]:
    """The values after every event of ours."""
    board = Board()
    ours, theirs = Ta1Computer(OURS, partner, board), Ta1Computer(THEIRS, None, board)
    found = []
    for event in recorded():
        if event.instrument == OURS:
            ours.on_event(event)
            found.append(ours.values())
        elif partner_is_here:
            theirs.on_event(event)
    return found


def cross(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values[-len(CROSS) :]


def test_the_values_are_those_of_the_bars_that_have_ended() -> None:
    bars: list[Bar] = []
    maker = BarMaker(OURS, bars.append, "10s")
    of_seconds, of_tens = Series(), Series()
    for event, values in zip((one for one in recorded() if one.instrument == OURS), run(), strict=True):
        maker.on_event(event)
        while bars:
            bar = bars.pop(0)
            (of_seconds if bar.interval == "1s" else of_tens).add(bar)
        np.testing.assert_array_equal(values[: len(FEATURES)], of_seconds.values)
        np.testing.assert_array_equal(values[len(FEATURES) : 2 * len(FEATURES)], of_tens.values)


def test_the_same_events_give_the_same_values_again() -> None:
    for first, again in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(first, again)


def test_a_partner_on_this_worker_is_seen() -> None:
    last = cross(run()[-1])
    assert not np.isnan(last).any()
    assert last[0] != 0 or last[1] != 0


@pytest.mark.parametrize(("partner", "is_here"), [(None, True), (THEIRS, False)])
def test_without_a_partner_here_only_what_it_says_is_undefined(partner: str | None, is_here: bool) -> None:
    for values, with_partner in zip(run(partner, is_here), run(), strict=True):
        assert np.isnan(cross(values)).all()
        np.testing.assert_array_equal(values[: -len(CROSS)], with_partner[: -len(CROSS)])


def test_a_mid_older_than_five_seconds_is_none() -> None:
    board = Board()
    board.put(THEIRS, 10 * SECOND_NS, 100.0)
    assert board.mid(THEIRS, 15 * SECOND_NS) == 100.0
    assert math.isnan(board.mid(THEIRS, 15 * SECOND_NS + 1))
    assert math.isnan(board.mid(OURS, 0))
    board.put(THEIRS, 11 * SECOND_NS, None)
    assert math.isnan(board.mid(THEIRS, 11 * SECOND_NS))


def mids_of(returns: list[float]) -> list[float]:
    """Mids with these log returns in basis points."""
    return [100.0 * math.exp(1e-4 * sum(returns[:count])) for count in range(len(returns) + 1)]


def test_who_follows_a_second_later_is_correlated_with_what_was_a_second_before() -> None:
    theirs = np.random.default_rng(3).normal(0, 5, 60).tolist()
    ours = [0.0, *theirs[:-1]]
    pair = Pair()
    values = [pair.add(*mids) for mids in zip(mids_of(ours), mids_of(theirs), strict=True)][-1]
    assert values[0] == pytest.approx(theirs[-1])
    assert values[1] == pytest.approx(sum(theirs[-10:]))
    assert values[2] == pytest.approx(sum(theirs[-5:]) - sum(ours[-5:]))
    assert values[3] == pytest.approx(np.corrcoef(ours[-30:], theirs[-30:])[0, 1])
    assert values[4] == pytest.approx(1.0)


def test_an_unknown_mid_is_unknown_for_as_long_as_it_counts() -> None:
    returns = np.random.default_rng(4).normal(0, 5, 80).tolist()
    ours, theirs = mids_of(returns), mids_of(returns)
    theirs[40] = math.nan
    pair = Pair()
    values = np.array([pair.add(*mids) for mids in zip(ours, theirs, strict=True)])
    assert not np.isnan(values[39]).any()
    assert np.isnan(values[41]).all()
    assert not np.isnan(values[51, :3]).any()
    assert np.isnan(values[51, 3:]).all()
    assert not np.isnan(values[72]).any()


def test_a_partner_that_does_not_move_is_correlated_with_nobody() -> None:
    pair = Pair()
    values = [pair.add(mid, 100.0) for mid in mids_of([1.0, -1.0] * 30)][-1]
    assert values[0] == 0
    assert np.isnan(values[3:]).all()


def test_the_sets_are_those_that_models_were_trained_on() -> None:
    assert (TA1.version, TA1_LONG.version) == ("ta1/81e9f490", "ta1_long/5dde6874"), "another meaning needs another id"


def test_the_long_set_has_every_indicator_over_minutes_and_none_of_a_partner() -> None:
    assert len(TA1_LONG) == 2 * len(FEATURES)
    assert {"rsi_14_1m", "rsi_14_5m", "vwap_20_bps_5m"} <= set(TA1_LONG.names)
    assert TA1_LONG.features[0].doc.endswith("; bars of 1 m.")
    assert COMPUTED_LONG.feature_set is TA1_LONG
    assert COMPUTED_LONG.make(OURS).values().shape == (len(TA1_LONG),)


def test_the_set_has_every_indicator_over_both_intervals_and_turns_for_a_sell_into_itself_and_back() -> None:
    assert len(TA1) == 2 * len(FEATURES) + len(CROSS) >= 100
    assert {"rsi_14_1s", "rsi_14_10s", "macd_hist_bps_1s", "partner_corr_30s"} <= set(TA1.names)
    assert all(one.doc.endswith(".") and not one.source for one in TA1.features)
    row = run()[-1]
    np.testing.assert_array_equal(TA1.for_sell(TA1.for_sell(row)), row)
    sell = dict(zip(TA1.names, TA1.for_sell(row).tolist(), strict=True))
    buy = dict(zip(TA1.names, row.tolist(), strict=True))
    assert sell["rsi_14_1s"] == -buy["rsi_14_1s"]
    assert sell["aroon_up_14_1s"] == buy["aroon_down_14_1s"]
    assert sell["atr_14_bps_1s"] == buy["atr_14_bps_1s"]


def test_a_computer_is_made_with_the_partner_that_the_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRADE_TA1_PARTNERS", '{"ETHUSDT.SIM": "BTCUSDT.SIM"}')
    assert COMPUTED.feature_set is TA1
    ours, theirs = make(OURS), COMPUTED.make(THEIRS)
    for event in recorded():
        (ours if event.instrument == OURS else theirs).on_event(event)
    assert not np.isnan(cross(ours.values())).any()
    assert np.isnan(cross(theirs.values())).all()


def test_before_any_event_all_is_undefined_and_a_wrong_event_changes_nothing() -> None:
    computer = Ta1Computer(OURS, None, Board())
    assert computer.values().shape == (len(TA1),)
    with pytest.raises(EventError, match="instrument"):
        computer.on_event(next(one for one in recorded() if one.instrument == THEIRS))
    assert np.isnan(computer.values()).all()


def closing(events: Iterable[pb.MarketEvent], intervals: Sequence[str]) -> Iterator[tuple[list[Bar], dict[str, float]]]:
    """Every bar that has ended so far and the values by name, each time that one has ended."""
    maker_bars: list[Bar] = []
    maker = BarMaker(OURS, maker_bars.append, intervals[-1])
    indicators = Indicators(OURS, intervals)
    names = [f"{one.name}_{interval}" for interval in intervals for one in FEATURES]
    ended = 0
    for event in events:
        maker.on_event(event)
        indicators.on_event(event)
        if len(maker_bars) > ended:
            ended = len(maker_bars)
            yield maker_bars, dict(zip(names, indicators.values().tolist(), strict=True))


def assert_follows_from(bars: Sequence[Bar], values: dict[str, float], interval: str) -> set[str]:
    """Holds every feature of an interval against its definition; returns those that are defined."""
    expected = ta1_definitions.of_last_bar([one for one in bars if one.interval == interval])
    found = {
        name.removesuffix(f"_{interval}"): value for name, value in values.items() if name.endswith(f"_{interval}")
    }
    assert not expected or expected.keys() == found.keys()
    for name, value in found.items():
        wanted = expected.get(name, math.nan)
        if math.isnan(value) and name in ta1_definitions.LEVELS:
            assert math.isnan(wanted) or wanted == 0, name
            continue
        # A float32 has 24 bits; what is a small difference of prices has fewer.
        assert value == pytest.approx(wanted, rel=1e-5, abs=1e-4, nan_ok=True), (name, interval, len(bars))
    return {name for name, value in found.items() if not math.isnan(value)}


def test_every_feature_is_what_its_definition_says_at_the_end_of_every_bar(seed: int) -> None:
    defined: set[str] = set()
    count = 0
    for bars, values in closing(PlainMarket(OURS, seed).run(140), ("1s",)):
        count += 1
        defined |= assert_follows_from(bars, values, "1s")
    assert count == 139
    assert defined == {one.name for one in FEATURES}


@pytest.mark.parametrize("gap", ["reset", "pause", "time ran back"])
def test_over_a_gap_every_feature_is_what_talib_says_of_the_bars_that_were_made(gap: str) -> None:
    """A reset leaves the history whole, if with bars that lack something; after the two others a new one begins."""
    market = PlainMarket(OURS, 3)
    minute = 60 * SECOND_NS

    def events() -> Iterator[pb.MarketEvent]:
        yield from market.run(103)
        market.now_ns += SECOND_NS // 3
        if gap == "reset":
            yield market.reset()
            market.now_ns += 4 * SECOND_NS
        else:
            market.now_ns += 11 * minute if gap == "pause" else -minute
        yield from market.run(100)

    defined: list[int] = []
    lacks = Lacks.NOTHING
    for bars, values in closing(events(), ("1s", "10s")):
        lacks |= bars[-1].lacks
        assert_follows_from(bars, values, "10s")
        defined.append(len(assert_follows_from(bars, values, "1s")))
    assert defined[101] == defined[-1] == len(FEATURES)
    assert lacks & Lacks.CONTINUITY
    soon_after = min(defined[102:])
    if gap == "reset":
        assert soon_after == len(FEATURES) - 1, "only the mid is unknown"
    else:
        assert soon_after < 5, "a new history has begun"


def test_over_a_gap_the_partner_is_compared_only_with_what_was_on_this_side_of_it() -> None:
    board, ours, theirs = Board(), PlainMarket(OURS, 4), PlainMarket(THEIRS, 5)
    computer, partner = Ta1Computer(OURS, THEIRS, board), Ta1Computer(THEIRS, None, board)

    def run(seconds: int) -> NDArray[np.float32]:
        for _ in range(seconds):
            for event in theirs.run(1):
                partner.on_event(event)
            for event in ours.run(1):
                computer.on_event(event)
        return cross(computer.values())

    assert not np.isnan(run(40)).any()
    ours.now_ns += 660 * SECOND_NS
    theirs.now_ns += 660 * SECOND_NS
    after = run(12)
    assert not np.isnan(after[:3]).any()
    assert np.isnan(after[3:]).all(), "thirty seconds have not passed again"
    assert not np.isnan(run(25)).any()
