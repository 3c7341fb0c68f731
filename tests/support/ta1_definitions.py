"""What each feature of `ta1` is, written down again: from the whole history, with all parameters.

TA-Lib's functions of a whole history give the indicators. What becomes of their outputs, and all that bars say
without TA-Lib, is computed here from the definitions in docs/bars.md, and shares nothing with the product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import talib
from numpy.typing import NDArray
from talib import MA_Type  # type: ignore[attr-defined]  # not in its stubs' list

from feature_cache.bars.bar import Bar, Lacks

Column = NDArray[np.float64]


def series_of(bars: Sequence[Bar]) -> list[Bar]:
    """The bars since the last beginning."""
    begun = max((place for place, bar in enumerate(bars) if bar.lacks & Lacks.BEGINNING), default=0)
    return list(bars[begun:])


def columns_of(bars: Sequence[Bar]) -> dict[str, Column]:
    """Open, high, low, close, volume from the first trade on; a bar without a trade stands at the close before."""
    rows: list[tuple[float, ...]] = []
    for bar in bars:
        if bar.trades:
            assert None not in (bar.open, bar.high, bar.low, bar.close)
            rows.append((bar.open, bar.high, bar.low, bar.close, bar.lots))  # type: ignore[arg-type]  # see above
        elif rows:
            rows.append((*[rows[-1][3]] * 4, 0))
    return dict(zip("ohlcv", np.array(rows, dtype=np.float64).reshape(-1, 5).T.copy(), strict=True))


def of_last_bar(bars: Sequence[Bar]) -> dict[str, float]:
    """Every feature of one interval after the last of these bars, of which nothing is older than the last beginning.

    A price that does not move at all for a window leaves some oscillators undefined, which is not considered here.
    """
    series = series_of(bars)
    columns = columns_of(series)
    if not len(columns["c"]):
        return {}
    found = {name: float(column[-1]) for name, column in _of_talib(**columns).items()}
    return found | _of_bars(series, columns)


def _of_talib(o: Column, h: Column, l: Column, c: Column, v: Column) -> dict[str, Any]:  # noqa: E741 - as traders say
    def above(price: Column) -> Column:
        return 1e4 * (c - price) / c

    def bps(price: Column) -> Column:
        return 1e4 * price / c

    def channel(upper: Column, middle: Column, lower: Column) -> tuple[Column, Column]:
        width = upper - lower
        with np.errstate(all="ignore"):
            return np.where(width > 1e-9 * c, (c - middle) / width, np.nan), bps(width)

    def over_volume(total: Column) -> Column:
        """Change of a total over 20 bars, over the volume of these 20."""
        found = np.full(len(c), np.nan)
        for last in range(20, len(c)):
            lots = v[last - 19 : last + 1].sum()
            found[last] = (total[last] - total[last - 20]) / lots if lots else np.nan
        return found

    macd, signal, histogram = talib.MACD(c, fastperiod=12, slowperiod=26, signalperiod=9)
    down, up = talib.AROON(h, l, timeperiod=14)
    plus, minus = talib.VORTEX(h, l, c, timeperiod=14)
    trend, direction = talib.SUPERTREND(h, l, c, timeperiod=10, multiplier=3.0)
    k, d = talib.STOCH(
        h, l, c, fastk_period=14, slowk_period=3, slowk_matype=MA_Type.SMA, slowd_period=3, slowd_matype=MA_Type.SMA
    )
    bollinger = channel(*talib.BBANDS(c, timeperiod=20, nbdevup=2.0, nbdevdn=2.0, matype=MA_Type.SMA))
    keltner = channel(*talib.KC(h, l, c, timeperiod=20, atrperiod=10, nbdev=2.0))
    donchian = channel(*talib.DONCHIAN(h, l, timeperiod=20))
    return {
        "sma_20_bps": above(talib.SMA(c, timeperiod=20)),
        "ema_12_bps": above(talib.EMA(c, timeperiod=12)),
        "ema_26_bps": above(talib.EMA(c, timeperiod=26)),
        "wma_20_bps": above(talib.WMA(c, timeperiod=20)),
        "dema_20_bps": above(talib.DEMA(c, timeperiod=20)),
        "tema_10_bps": above(talib.TEMA(c, timeperiod=10)),
        "trima_20_bps": above(talib.TRIMA(c, timeperiod=20)),
        "kama_20_bps": above(talib.KAMA(c, timeperiod=20)),
        "t3_5_bps": above(talib.T3(c, timeperiod=5, vfactor=0.7)),
        "hma_20_bps": above(talib.HMA(c, timeperiod=20)),
        "rma_14_bps": above(talib.RMA(c, timeperiod=14)),
        "zlema_20_bps": above(talib.ZLEMA(c, timeperiod=20)),
        "linearreg_14_bps": above(talib.LINEARREG(c, timeperiod=14)),
        "tsf_14_bps": above(talib.TSF(c, timeperiod=14)),
        "midprice_14_bps": above(talib.MIDPRICE(h, l, timeperiod=14)),
        "sar_bps": above(talib.SAR(h, l, acceleration=0.02, maximum=0.2)),
        "slope_14_bps": bps(talib.LINEARREG_SLOPE(c, timeperiod=14)),
        "supertrend_bps": above(trend),
        "supertrend": direction,
        "macd_bps": bps(macd),
        "macd_signal_bps": bps(signal),
        "macd_hist_bps": bps(histogram),
        "adx_14": talib.ADX(h, l, c, timeperiod=14),
        "adxr_14": talib.ADXR(h, l, c, timeperiod=14),
        "plus_di_14": talib.PLUS_DI(h, l, c, timeperiod=14),
        "minus_di_14": talib.MINUS_DI(h, l, c, timeperiod=14),
        "aroon_down_14": down,
        "aroon_up_14": up,
        "aroonosc_14": up - down,
        "vortex_plus_14": plus,
        "vortex_minus_14": minus,
        "rsi_14": talib.RSI(c, timeperiod=14) - 50,
        "stoch_k_14": k - 50,
        "stoch_d_14": d - 50,
        "cci_20": talib.CCI(h, l, c, timeperiod=20),
        "roc_10_bps": 1e4 * (c / np.concatenate([np.full(10, np.nan), c[:-10]])[: len(c)] - 1),
        "willr_14": talib.WILLR(h, l, c, timeperiod=14) + 50,
        "cmo_14": talib.CMO(c, timeperiod=14),
        "ppo_bps": 100 * talib.PPO(c, fastperiod=12, slowperiod=26, matype=MA_Type.EMA),
        "trix_10_bps": 100 * talib.TRIX(c, timeperiod=10),
        "ultosc": talib.ULTOSC(h, l, c, timeperiod1=7, timeperiod2=14, timeperiod3=28) - 50,
        "bop": np.divide(c - o, h - l, out=np.zeros(len(c)), where=h > l),
        "tsi": talib.TSI(c, firstperiod=25, secondperiod=13),
        "smi": talib.SMI(h, l, c, timeperiod=13, fastperiod=2, slowperiod=25, signalperiod=9)[0],
        "efficiency_10": talib.ER(c, timeperiod=10),
        "ao_bps": bps(talib.SMA((h + l) / 2, timeperiod=5) - talib.SMA((h + l) / 2, timeperiod=34)),
        "imi_14": talib.IMI(o, c, timeperiod=14) - 50,
        "coppock_bps": 100 * talib.COPPOCK(c, wmaperiod=10, roc1period=11, roc2period=14),
        "dpo_20_bps": bps(talib.DPO(c, timeperiod=20)),
        "vhf_28": talib.VHF(c, timeperiod=28),
        "bollinger_20_position": bollinger[0],
        "bollinger_20_width_bps": bollinger[1],
        "keltner_20_position": keltner[0],
        "keltner_20_width_bps": keltner[1],
        "donchian_20_position": donchian[0],
        "donchian_20_width_bps": donchian[1],
        "atr_14_bps": bps(talib.ATR(h, l, c, timeperiod=14)),
        "trange_bps": bps(talib.TRANGE(h, l, c)),
        "stddev_20_bps": bps(talib.STDDEV(c, timeperiod=20, nbdev=1.0)),
        "avgdev_20_bps": bps(talib.AVGDEV(c, timeperiod=20)),
        "rvi_14": talib.RVI(c, timeperiod=14, stddevperiod=10) - 50,
        "adr_14_bps": bps(talib.ADR(h, l, timeperiod=14)),
        "obv_20": over_volume(talib.OBV(c, v)),
        "ad_20": over_volume(talib.AD(h, l, c, v)),
        "cmf_20": talib.CMF(h, l, c, v, timeperiod=20),
        "mfi_14": talib.MFI(h, l, c, v, timeperiod=14) - 50,
        "pvo": talib.PVO(v, fastperiod=12, slowperiod=26, matype=1),
    }


def _of_bars(series: Sequence[Bar], columns: dict[str, Column]) -> dict[str, float]:
    """What bars say without TA-Lib."""
    c, mid = columns["c"], series[-1].mid_close
    found = {
        "ret_bps": 1e4 * math.log(c[-1] / c[-2]) if len(c) > 1 else math.nan,
        "above_mid_bps": math.nan if mid is None else 1e4 * (c[-1] - mid / 2) / (mid / 2),
    }
    names = ("vwap_20_bps", "flow_20", "trades_20", "quiet_20")
    if len(c) < 20:
        return found | dict.fromkeys(names, math.nan)
    twenty = series[-20:]
    lots = sum(bar.lots for bar in twenty)
    bought, sold = sum(bar.bought for bar in twenty), sum(bar.sold for bar in twenty)
    price = sum(bar.notional for bar in twenty) / lots if lots else math.nan
    values = (
        1e4 * (c[-1] - price) / c[-1],
        (bought - sold) / (bought + sold) if bought + sold else 0.0,
        sum(bar.trades for bar in twenty) / 20,
        sum(not bar.trades for bar in twenty) / 20,
    )
    return found | dict(zip(names, values, strict=True))


LEVELS: Final = frozenset(("supertrend", "aroon_down_14", "aroon_up_14", "aroonosc_14"))
"""Whole numbers, of which TA-Lib gives 0 where there is none."""
