"""The indicators of `ta1` over the bars of one interval, each as a function of TA-Lib and what becomes of its outputs.

TA-Lib's own outputs are prices, lots, or numbers from 0 to 100. A model that serves many instruments and both sides
needs numbers without a currency, with a sign where they have a direction. So a price becomes its distance from the
close in basis points, and an oscillator counts from its middle: an RSI of 70 is 20. For a sell, 20 becomes -20, which
is the RSI of 30 that a falling market has.

Where an oscillator divides by how much the price moved, and it did not move, TA-Lib gives 0, which would read as "sold
out". Here it is undefined: `Indicator.window` says after how many bars without any move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from feature_cache.feature_set import Feature

Outputs = tuple[float, ...]
"""What TA-Lib gives for a bar."""
HISTORY_BARS: Final = 600
"""Stored bars of each interval that are looked up: ten minutes of those of a second, fifty hours of those of five
minutes. The recursive indicators have forgotten by then what was before, as far as a float32 can tell."""
CHANGE_BARS: Final = 20
"""How far back `Indicator.is_total` looks."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A feature of a TA-Lib function's outputs."""

    feature: Feature
    """Without its interval."""
    value: Callable[[Outputs, float], float]
    """Of the outputs and the close."""


@dataclass(frozen=True, slots=True)
class Indicator:
    """One function of TA-Lib."""

    function: str
    group: str
    """Trend, momentum, volatility or volume."""
    inputs: str
    """Its arguments: `o`, `h`, `l`, `c` and `v`, in its order."""
    derived: tuple[Derived, ...]
    parameters: Mapping[str, float] = field(default_factory=dict)
    window: int = 0
    """After how many bars in a row without a move it is undefined; 0: always defined."""
    memory: int = 1
    """For how many bars such a window spoils what it gives."""
    is_total: bool = False
    """It adds up since the beginning: what counts is its change over `CHANGE_BARS`, and the lots meanwhile. These two
    stand for its outputs."""


def _feature(
    name: str,
    doc: str,
    value: Callable[[Outputs, float], float],
    *,
    unit: str = "",
    lowest: float = -math.inf,
    highest: float = math.inf,
    signed: bool = True,
    swapped_with: str = "",
) -> Derived:
    return Derived(Feature(name, unit, doc, lowest, highest, signed, swapped_with), value)


def _distance(name: str, function: str, what: str, inputs: str = "c", **parameters: float) -> Indicator:
    """How far the close is above a price that TA-Lib gives first, in basis points."""
    derived = _feature(name, f"Close above {what}.", lambda out, close: _bps(close - out[0], close), unit="bps")
    return Indicator(function, "trend", inputs, (derived,), parameters)


def _bps(part: float, close: float) -> float:
    return 1e4 * part / close


def _centred(name: str, doc: str, middle: float, place: int = 0) -> Derived:
    """An oscillator from 0 to 100, or from -100 to 0, counted from its middle."""
    return _feature(name, doc, lambda out, _: out[place] - middle, lowest=-50.0, highest=50.0)


def _size(
    name: str, doc: str, place: int = 0, scale: float = 1.0, highest: float = math.inf, unit: str = ""
) -> Derived:
    """A number without direction."""
    return _feature(name, doc, lambda out, _: scale * out[place], unit=unit, lowest=0.0, highest=highest, signed=False)


def _size_bps(name: str, doc: str) -> Derived:
    """A difference of prices without direction."""
    return _feature(name, doc, lambda out, close: _bps(out[0], close), unit="bps", lowest=0.0, signed=False)


def _signed(name: str, doc: str, scale: float = 1.0, bound: float = math.inf, unit: str = "") -> Derived:
    return _feature(name, doc, lambda out, _: scale * out[0], unit=unit, lowest=-bound, highest=bound)


def _pair(names: Sequence[str], docs: Sequence[str], highest: float = math.inf) -> tuple[Derived, Derived]:
    """What speaks for a rise and what for a fall: for a sell they change places. TA-Lib's places are 0 and 1."""
    first, second = (
        _feature(
            name,
            doc,
            lambda out, _, place=place: out[place],  # type: ignore[misc]  # a default of a lambda has no type
            lowest=0.0,
            highest=highest,
            signed=False,
            swapped_with=names[1 - place],
        )
        for place, (name, doc) in enumerate(zip(names, docs, strict=True))
    )
    return first, second


def _band(name: str, what: str) -> tuple[Derived, Derived]:
    """Of upper, middle and lower band: where the close is between them, and how wide they are."""
    return (
        _feature(f"{name}_position", f"Close above the middle of {what}, over their width.", _position),
        _feature(
            f"{name}_width_bps",
            f"Width of {what}.",
            lambda out, close: _bps(out[0] - out[2], close),
            unit="bps",
            lowest=0.0,
            signed=False,
        ),
    )


def _position(out: Outputs, close: float) -> float:
    width = out[0] - out[2]
    return (close - out[1]) / width if width > 1e-9 * close else math.nan  # less is rounding


def _over_lots(out: Outputs, _: float) -> float:
    change, lots = out
    return change / lots if lots else math.nan


TREND: Final = (
    _distance("sma_20_bps", "SMA", "its mean over 20 bars", timeperiod=20),
    _distance("ema_12_bps", "EMA", "its exponential mean, 12 bars", timeperiod=12),
    _distance("ema_26_bps", "EMA", "its exponential mean, 26 bars", timeperiod=26),
    _distance("wma_20_bps", "WMA", "its linearly weighted mean, 20 bars", timeperiod=20),
    _distance("dema_20_bps", "DEMA", "its double exponential mean, 20 bars", timeperiod=20),
    _distance("tema_10_bps", "TEMA", "its triple exponential mean, 10 bars", timeperiod=10),
    _distance("trima_20_bps", "TRIMA", "its triangular mean, 20 bars", timeperiod=20),
    _distance("kama_20_bps", "KAMA", "Kaufman's adaptive mean, 20 bars", timeperiod=20),
    _distance("t3_5_bps", "T3", "Tillson's T3, 5 bars", timeperiod=5),
    _distance("hma_20_bps", "HMA", "Hull's mean, 20 bars", timeperiod=20),
    _distance("rma_14_bps", "RMA", "Wilder's mean, 14 bars", timeperiod=14),
    _distance("zlema_20_bps", "ZLEMA", "the exponential mean without lag, 20 bars", timeperiod=20),
    _distance("linearreg_14_bps", "LINEARREG", "the end of its regression line, 14 bars", timeperiod=14),
    _distance("tsf_14_bps", "TSF", "that line a bar further", timeperiod=14),
    _distance("midprice_14_bps", "MIDPRICE", "the middle of highest and lowest price, 14 bars", "hl", timeperiod=14),
    _distance("sar_bps", "SAR", "the parabolic stop and reverse", "hl"),
    Indicator(
        "LINEARREG_SLOPE",
        "trend",
        "c",
        (_feature("slope_14_bps", "Slope of the regression line a bar.", lambda out, c: _bps(out[0], c), unit="bps"),),
        {"timeperiod": 14},
    ),
    Indicator(
        "SUPERTREND",
        "trend",
        "hlc",
        (
            _feature("supertrend_bps", "Close above the Supertrend.", lambda out, c: _bps(c - out[0], c), unit="bps"),
            _feature(
                "supertrend", "1 while it supports, -1 while it resists.", lambda out, _: out[1], lowest=-1, highest=1
            ),
        ),
        {"timeperiod": 10, "multiplier": 3.0},
    ),
    Indicator(
        "MACD",
        "trend",
        "c",
        (
            _feature("macd_bps", "MACD 12, 26, 9.", lambda out, close: _bps(out[0], close), unit="bps"),
            _feature("macd_signal_bps", "Its signal line.", lambda out, close: _bps(out[1], close), unit="bps"),
            _feature("macd_hist_bps", "The one less the other.", lambda out, close: _bps(out[2], close), unit="bps"),
        ),
    ),
    Indicator("ADX", "trend", "hlc", (_size("adx_14", "Strength of the trend, 14 bars.", highest=100.0),)),
    Indicator("ADXR", "trend", "hlc", (_size("adxr_14", "Its mean with what it was.", highest=100.0),)),
    Indicator(
        "PLUS_DI",
        "trend",
        "hlc",
        (
            _feature(
                "plus_di_14",
                "Movement upwards, 14 bars.",
                lambda out, _: out[0],
                lowest=0.0,
                highest=100.0,
                signed=False,
                swapped_with="minus_di_14",
            ),
        ),
    ),
    Indicator(
        "MINUS_DI",
        "trend",
        "hlc",
        (
            _feature(
                "minus_di_14",
                "Movement downwards, 14 bars.",
                lambda out, _: out[0],
                lowest=0.0,
                highest=100.0,
                signed=False,
                swapped_with="plus_di_14",
            ),
        ),
    ),
    Indicator(
        "AROON",
        "trend",
        "hl",
        _pair(
            ("aroon_down_14", "aroon_up_14"),
            ("How recent the lowest of 14 bars is.", "How recent the highest of 14 bars is."),
            100.0,
        ),
    ),
    Indicator("AROONOSC", "trend", "hl", (_signed("aroonosc_14", "Aroon up less Aroon down.", bound=100.0),)),
    Indicator(
        "VORTEX",
        "trend",
        "hlc",
        _pair(("vortex_plus_14", "vortex_minus_14"), ("Vortex upwards, 14 bars.", "Vortex downwards, 14 bars.")),
        window=14,
    ),
)

MOMENTUM: Final = (
    Indicator("RSI", "momentum", "c", (_centred("rsi_14", "Relative strength, 14 bars, less 50.", 50.0),), window=14),
    Indicator(
        "STOCH",
        "momentum",
        "hlc",
        (
            _centred("stoch_k_14", "Stochastic %K 14, 3, less 50.", 50.0),
            _centred("stoch_d_14", "Its mean over 3 bars, %D, less 50.", 50.0, place=1),
        ),
        {"fastk_period": 14, "slowk_period": 3, "slowd_period": 3},
        window=13,
        memory=5,
    ),
    Indicator("CCI", "momentum", "hlc", (_signed("cci_20", "Commodity channel index, 20 bars."),), {"timeperiod": 20}),
    Indicator(
        "ROC", "momentum", "c", (_signed("roc_10_bps", "Change over 10 bars.", 100.0, unit="bps"),), {"timeperiod": 10}
    ),
    Indicator("WILLR", "momentum", "hlc", (_centred("willr_14", "Williams %R, 14 bars, plus 50.", -50.0),), window=13),
    Indicator("CMO", "momentum", "c", (_signed("cmo_14", "Chande momentum, 14 bars.", bound=100.0),), window=14),
    Indicator("PPO", "momentum", "c", (_signed("ppo_bps", "MACD 12, 26 over the slow mean.", 100.0, unit="bps"),)),
    Indicator(
        "TRIX",
        "momentum",
        "c",
        (_signed("trix_10_bps", "Change of the triple exponential mean, 10 bars.", 100.0, unit="bps"),),
        {"timeperiod": 10},
    ),
    Indicator(
        "ULTOSC", "momentum", "hlc", (_centred("ultosc", "Ultimate oscillator 7, 14, 28, less 50.", 50.0),), window=7
    ),
    Indicator("BOP", "momentum", "ohlc", (_signed("bop", "Close less open, over high less low.", bound=1.0),)),
    Indicator("TSI", "momentum", "c", (_signed("tsi", "True strength 25, 13.", bound=100.0),), window=25),
    Indicator("SMI", "momentum", "hlc", (_signed("smi", "Stochastic momentum 13, 2, 25.", bound=100.0),), window=13),
    Indicator(
        "ER",
        "momentum",
        "c",
        (_size("efficiency_10", "Change over 10 bars, over the way there.", highest=1.0),),
        {"timeperiod": 10},
        window=10,
    ),
    Indicator(
        "AO",
        "momentum",
        "hl",
        (_feature("ao_bps", "Awesome oscillator 5, 34.", lambda out, close: _bps(out[0], close), unit="bps"),),
    ),
    Indicator("IMI", "momentum", "oc", (_centred("imi_14", "Intraday momentum, 14 bars, less 50.", 50.0),), window=13),
    Indicator("COPPOCK", "momentum", "c", (_signed("coppock_bps", "Coppock curve 10, 11, 14.", 100.0, unit="bps"),)),
    Indicator(
        "DPO",
        "momentum",
        "c",
        (_feature("dpo_20_bps", "Price without its trend, 20 bars.", lambda out, c: _bps(out[0], c), unit="bps"),),
    ),
    Indicator("VHF", "momentum", "c", (_size("vhf_28", "Range over the way, 28 bars.", highest=1.0),), window=28),
)

VOLATILITY: Final = (
    Indicator("BBANDS", "volatility", "c", _band("bollinger_20", "Bollinger's bands, 20 bars"), {"timeperiod": 20}),
    Indicator("KC", "volatility", "hlc", _band("keltner_20", "Keltner's channel, 20 bars")),
    Indicator("DONCHIAN", "volatility", "hl", _band("donchian_20", "Donchian's channel, 20 bars")),
    Indicator("ATR", "volatility", "hlc", (_size_bps("atr_14_bps", "Mean true range, 14 bars."),)),
    Indicator("TRANGE", "volatility", "hlc", (_size_bps("trange_bps", "True range."),)),
    Indicator(
        "STDDEV",
        "volatility",
        "c",
        (_size_bps("stddev_20_bps", "Standard deviation of the close, 20 bars."),),
        {"timeperiod": 20},
    ),
    Indicator(
        "AVGDEV",
        "volatility",
        "c",
        (_size_bps("avgdev_20_bps", "Mean deviation of the close, 20 bars."),),
        {"timeperiod": 20},
    ),
    Indicator(
        "RVI", "volatility", "c", (_centred("rvi_14", "Relative volatility, less 50.", 50.0),), window=10, memory=14
    ),
    Indicator("ADR", "volatility", "hl", (_size_bps("adr_14_bps", "Mean of high less low, 14 bars."),)),
)

VOLUME: Final = (
    Indicator(
        "OBV",
        "volume",
        "cv",
        (
            _feature(
                "obv_20", "Change of on-balance volume over the volume, 20 bars.", _over_lots, lowest=-1, highest=1
            ),
        ),
        is_total=True,
    ),
    Indicator(
        "AD",
        "volume",
        "hlcv",
        (_feature("ad_20", "Change of accumulation over the volume, 20 bars.", _over_lots, lowest=-1, highest=1),),
        is_total=True,
    ),
    Indicator("CMF", "volume", "hlcv", (_signed("cmf_20", "Chaikin money flow, 20 bars.", bound=1.0),), window=20),
    Indicator("MFI", "volume", "hlcv", (_centred("mfi_14", "Money flow, 14 bars, less 50.", 50.0),), window=14),
    Indicator(
        "PVO", "volume", "v", (_feature("pvo", "MACD of the volume in percent.", lambda out, _: out[0], signed=False),)
    ),
)

INDICATORS: Final = (*TREND, *MOMENTUM, *VOLATILITY, *VOLUME)

FLOW_BARS: Final = 20
"""Bars that the features of `FLOW` look at."""
FLOW: Final = (
    Feature("ret_bps", "bps", "Log return of the close.", signed=True),
    Feature("vwap_20_bps", "bps", "Close above the price of all trades by volume, 20 bars.", signed=True),
    Feature("flow_20", "", "Bought less sold volume over their sum, 20 bars.", -1.0, 1.0, signed=True),
    Feature("trades_20", "", "Trades a bar, 20 bars.", lowest=0.0),
    Feature("quiet_20", "", "Share of the bars without a trade, 20 bars.", 0.0, 1.0),
    Feature("above_mid_bps", "bps", "Close of the trades above that of the mid.", signed=True),
)
"""What bars say without TA-Lib."""
FEATURES: Final = (*(one.feature for each in INDICATORS for one in each.derived), *FLOW)
"""Of one interval, in the order of `Series.values`."""
