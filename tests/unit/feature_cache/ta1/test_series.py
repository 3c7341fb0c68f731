"""Every indicator at every bar against TA-Lib's function over the whole history."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final

import numpy as np
import pytest
import talib
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from feature_cache.bars.bar import SECOND_NS, Bar, Lacks
from feature_cache.bars.maker import BarMaker
from feature_cache.feature_set import FeatureSet
from feature_cache.sources.simulator import simulate
from feature_cache.ta1.indicators import FEATURES, FLOW, FLOW_BARS, HISTORY_BARS, INDICATORS, Indicator
from feature_cache.ta1.series import Running, Series

START: Final = 1_700_000_100 * SECOND_NS
NAMES: Final = [one.name for one in FEATURES]
TEST_SET: Final = FeatureSet("test", FEATURES)
ONE_UP: Final = 1_000_000
"""A price so high that a tick is a basis point's hundredth: what rises and what falls by it weigh the same."""


def bar(number: int, prices: Sequence[int], lots: int = 10, bought: int = 5, lacks: Lacks = Lacks.NOTHING) -> Bar:
    """A bar of one second; without prices, one without a trade."""
    traded = bool(prices)
    return Bar(
        instrument="BTCUSDT.TEST",
        start_ns=START + number * SECOND_NS,
        width_ns=SECOND_NS,
        price_decimals=2,
        size_decimals=3,
        open=prices[0] if traded else None,
        high=max(prices) if traded else None,
        low=min(prices) if traded else None,
        close=prices[-1] if traded else None,
        trades=len(prices),
        bought=bought if traded else 0,
        sold=lots - bought if traded else 0,
        lots=lots if traded else 0,
        notional=sum(prices) * lots // len(prices) if traded else 0,
        mid_open=None,
        mid_high=None,
        mid_low=None,
        mid_close=prices[0] + prices[-1] if traded else None,
        lacks=lacks if number else Lacks.BEGINNING,
    )


def walk(seed: int, count: int, quiet: float, step: int = 30, price: int = ONE_UP) -> list[Bar]:
    """A random walk, some bars of which have no trade, in stretches."""
    dice = random.Random(seed)
    bars, is_quiet = [], False
    for number in range(count):
        is_quiet = dice.random() < (0.8 if is_quiet else quiet)
        prices = []
        for _ in range(0 if is_quiet else dice.randint(1, 6)):
            price = max(1, price + dice.randint(-step, step))
            prices.append(price)
        lots = dice.randint(1, 10**9)
        bars.append(bar(number, prices, lots, dice.randint(0, lots)))
    return bars


def columns_of(bars: Sequence[Bar]) -> dict[str, NDArray[np.float64]]:
    """The history, as the module says that it is: from the first trade on, without a trade at the close before."""
    rows: list[tuple[float, ...]] = []
    for one in bars:
        if one.trades:
            assert one.open is not None
            assert one.high is not None
            assert one.low is not None
            assert one.close is not None
            rows.append((one.open, one.high, one.low, one.close, one.lots))
        elif rows:
            rows.append((*[rows[-1][3]] * 4, 0))
    return dict(zip("ohlcv", np.array(rows, dtype=np.float64).reshape(-1, 5).T.copy(), strict=True))


def batch(indicator: Indicator, columns: dict[str, NDArray[np.float64]]) -> list[NDArray[Any]]:
    found = getattr(talib, indicator.function)(*(columns[one] for one in indicator.inputs), **indicator.parameters)
    return list(found) if isinstance(found, tuple) else [found]


def assert_equals_batch(bars: Sequence[Bar]) -> None:
    columns = columns_of(bars)
    rows = list(zip(*(columns[one].tolist() for one in "ohlcv"), strict=True))
    for indicator in INDICATORS:
        running = Running(indicator)
        outputs = batch(indicator, columns)
        for count in range(1, len(rows) + 1):
            history = None if running.is_open else [columns[one][:count] for one in "ohlcv"]
            got = running.add(rows[count - 1], history)
            expected = tuple(output[count - 1] for output in outputs)
            if got is None:
                # An output of whole numbers has 0 where there is none.
                assert all(math.isnan(one) or isinstance(one, np.integer) for one in expected), indicator.function
            else:
                assert got == expected, (indicator.function, count)  # not a single bit may differ


@pytest.mark.parametrize("quiet", [0.0, 0.1, 0.5])
def test_every_indicator_equals_the_batch_function_at_every_bar_of_a_random_walk(quiet: float) -> None:
    assert_equals_batch(walk(round(100 * quiet), 400, quiet))


@given(seed=st.integers(0, 10**6), count=st.integers(1, 90), quiet=st.floats(0, 0.9), step=st.integers(0, 40))
@settings(max_examples=12, deadline=None)
def test_every_indicator_equals_the_batch_function_whatever_the_walk(
    seed: int, count: int, quiet: float, step: int
) -> None:
    assert_equals_batch(walk(seed, count, quiet, step, price=500))


@pytest.mark.parametrize("count", [0, 1, 21, 22, 23, 60, 300])
@pytest.mark.parametrize("quiet", [0.0, 0.5])
def test_a_history_that_is_there_at_once_gives_what_bar_by_bar_does_then_and_later(count: int, quiet: float) -> None:
    bars = walk(count, count + 80, quiet)
    one_by_one, at_once = Series(), Series()
    for one in bars[:count]:
        one_by_one.add(one)
    at_once.add(bars[-1])  # of another history, which must not matter
    at_once.resume(bars[:count])
    np.testing.assert_array_equal(at_once.values, one_by_one.values)
    for one in bars[count:]:
        one_by_one.add(one)
        at_once.add(one)
        np.testing.assert_array_equal(at_once.values, one_by_one.values)


@pytest.mark.parametrize("quiet", [0.05, 0.3])
def test_after_as_many_bars_as_a_worker_looks_up_nothing_older_counts(quiet: float) -> None:
    bars = walk(7, 1_500, quiet)
    whole, late = Series(), Series()
    whole.resume(bars[:-50])
    late.resume(bars[-50 - HISTORY_BARS : -50])
    for one in bars[-50:]:
        np.testing.assert_allclose(late.values, whole.values, rtol=1e-6, atol=1e-9)
        whole.add(one)
        late.add(one)


@cache
def simulated_bars() -> tuple[Bar, ...]:
    made: list[Bar] = []
    maker = BarMaker("BTCUSDT.SIM", made.append, "1s")
    for event in simulate(3, ["BTCUSDT.SIM"], duration_seconds=120, events_per_second=30):
        maker.on_event(event)
    return tuple(made)


def test_every_indicator_equals_the_batch_function_at_every_bar_of_a_simulated_market() -> None:
    assert any(not one.trades for one in simulated_bars())
    assert_equals_batch(simulated_bars())


def values_of(bars: Sequence[Bar]) -> list[NDArray[np.float32]]:
    series = Series()
    found = []
    for one in bars:
        series.add(one)
        found.append(series.values)
    return found


def named(values: NDArray[np.float32]) -> dict[str, float]:
    return dict(zip(NAMES, values.tolist(), strict=True))


def test_features_are_the_outputs_of_the_batch_functions_without_a_currency() -> None:
    bars = walk(5, 80, 0.0)
    c = columns_of(bars)
    now, close = named(values_of(bars)[-1]), c["c"][-1]
    assert now["rsi_14"] == pytest.approx(talib.RSI(c["c"])[-1] - 50, rel=1e-6)
    assert now["ema_26_bps"] == pytest.approx(1e4 * (1 - talib.EMA(c["c"], 26)[-1] / close), rel=1e-4)
    macd, signal, hist = (one[-1] for one in talib.MACD(c["c"]))
    assert [now[f"macd{of}_bps"] for of in ("", "_signal", "_hist")] == pytest.approx(
        [1e4 * one / close for one in (macd, signal, hist)], rel=1e-5
    )
    upper, middle, lower = (one[-1] for one in talib.BBANDS(c["c"], 20))
    assert now["bollinger_20_position"] == pytest.approx((close - middle) / (upper - lower), rel=1e-5)
    assert now["bollinger_20_width_bps"] == pytest.approx(1e4 * (upper - lower) / close, rel=1e-5)
    assert now["atr_14_bps"] == pytest.approx(1e4 * talib.ATR(c["h"], c["l"], c["c"])[-1] / close, rel=1e-5)
    assert now["plus_di_14"] == pytest.approx(talib.PLUS_DI(c["h"], c["l"], c["c"])[-1], rel=1e-6)
    obv = talib.OBV(c["c"], c["v"])
    assert now["obv_20"] == pytest.approx((obv[-1] - obv[-21]) / c["v"][-20:].sum(), rel=1e-6)
    assert now["mfi_14"] == pytest.approx(talib.MFI(c["h"], c["l"], c["c"], c["v"])[-1] - 50, rel=1e-6)


def test_what_bars_say_without_ta_lib_follows_from_the_last_twenty() -> None:
    bars = walk(6, 60, 0.3)
    now, last = named(values_of(bars)[-1]), bars[-FLOW_BARS:]
    c = columns_of(bars)["c"]
    assert now["ret_bps"] == pytest.approx(1e4 * math.log(c[-1] / c[-2]), rel=1e-5)
    vwap = sum(one.notional for one in last) / sum(one.lots for one in last)
    assert now["vwap_20_bps"] == pytest.approx(1e4 * (1 - vwap / c[-1]), rel=1e-4)
    bought, sold = sum(one.bought for one in last), sum(one.sold for one in last)
    assert now["flow_20"] == pytest.approx((bought - sold) / (bought + sold), rel=1e-6)
    assert now["trades_20"] == pytest.approx(sum(one.trades for one in last) / 20)
    assert now["quiet_20"] == pytest.approx(sum(not one.trades for one in last) / 20)


def test_a_market_upside_down_has_the_features_that_a_sell_sees() -> None:
    """What `signed` and `swapped_with` claim. Prices are mirrored at one that is far above every move."""
    upright = walk(8, 120, 0.1, step=3)
    bars = [
        bar(
            number,
            [2 * ONE_UP - price for price in (one.open, one.low, one.high, one.close) if price is not None],
            one.lots,
            one.sold,
        )
        for number, one in enumerate(upright)
    ]
    bars = [replace(turned, trades=one.trades) for turned, one in zip(bars, upright, strict=True)]
    as_sell = TEST_SET.for_sell(np.array(values_of(upright))[60:])
    turned = np.array(values_of(bars))[60:]
    for place, feature in enumerate(FEATURES):
        if feature.name == "vwap_20_bps":  # the mirrored bars have no notional of their own
            continue
        scale = max(1e-9, float(np.nanmax(np.abs(as_sell[:, place]))))
        np.testing.assert_allclose(turned[:, place], as_sell[:, place], atol=2e-3 * scale, err_msg=feature.name)
        if feature.signed:
            assert np.nanmax(np.abs(as_sell[:, place])) > 0


def test_before_the_first_trade_there_is_no_history() -> None:
    bars = [bar(number, []) for number in range(50)]
    assert all(np.isnan(values).all() for values in values_of(bars))


def test_an_oscillator_of_a_price_that_did_not_move_is_undefined_and_not_sold_out() -> None:
    moving = walk(9, 60, 0.0)
    last = moving[-1].close
    assert last is not None
    still = [bar(60 + number, [last] if number % 2 else []) for number in range(40)]
    again = [bar(100 + number, [last + 10 * (number % 3 + 1), last]) for number in range(20)]
    values = [named(one) for one in values_of([*moving, *still, *again])]
    for name in ("stoch_k_14", "stoch_d_14", "willr_14", "mfi_14", "imi_14", "ultosc", "efficiency_10"):
        assert not math.isnan(values[59][name])
        assert math.isnan(values[99][name]), name
        assert not math.isnan(values[119][name])
    assert values[99]["bollinger_20_width_bps"] == pytest.approx(0, abs=1e-3)
    assert math.isnan(values[99]["bollinger_20_position"])
    assert values[99]["quiet_20"] == 0.5


def test_all_is_defined_after_45_bars_which_a_worker_reads_again_when_it_starts() -> None:
    values = values_of(walk(10, 46, 0.0))
    undefined = [name for name, value in named(values[45]).items() if math.isnan(value)]
    assert not undefined


def test_a_new_series_knows_nothing_of_the_one_before() -> None:
    first, second = walk(11, 70, 0.1), walk(12, 70, 0.1)
    after = values_of([*first, *second])[70:]
    for got, expected in zip(after, values_of(second), strict=True):
        np.testing.assert_array_equal(got, expected)


@given(seed=st.integers(0, 10**6), quiet=st.floats(0, 0.95), step=st.integers(0, 400))
@settings(max_examples=20, deadline=None)
def test_every_value_is_in_its_range_or_undefined(seed: int, quiet: float, step: int) -> None:
    values = np.array(values_of(walk(seed, 120, quiet, step, price=1000)))
    inside = (values >= TEST_SET.lowest) & (values <= TEST_SET.highest)
    assert (inside | np.isnan(values)).all()
    assert not np.isinf(values).any()


def test_there_are_more_than_fifty_indicators_and_each_says_what_it_is() -> None:
    assert len(FEATURES) - len(FLOW) >= 50
    assert len(set(NAMES)) == len(NAMES)
    for indicator in INDICATORS:
        assert indicator.group in {"trend", "momentum", "volatility", "volume"}
        assert all(one.feature.doc.endswith(".") for one in indicator.derived)
