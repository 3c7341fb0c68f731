"""The features computed with pandas, for comparison: over the whole frame at once, or live over its last part.

Over the whole frame a row is cheap, but no row is available before all are. Live, a user without an engine recomputes
the last half minute for every vector.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final

import numpy as np
import pandas as pd

from feature_cache.engine.engine import FeatureEngine
from feature_cache.features import MF1
from local.bench.feature_steps import Step, measured
from pretrade.market.v1 import market_pb2 as pb

_PUBLICATIONS: Final = 20
_HISTORY: Final = pd.Timedelta(seconds=31)


def frame_of(events: Iterable[pb.MarketEvent]) -> pd.DataFrame:
    """One instrument's events as a frame by event time: best level, depth sums and trades.

    The book behind it is ours, since pandas has none; its cost counts for neither side.
    """
    rows = []
    engine: FeatureEngine | None = None
    for event in events:
        if engine is None:
            engine = FeatureEngine(event.instrument)
        engine.on_event(event)
        bids, asks = engine.book.bids.top(10), engine.book.asks.top(10)
        snapshot = engine.snapshot()
        unit = 10.0 ** -(event.price_decimals + event.size_decimals)
        trade = event.trade if event.WhichOneof("event") == "trade" else None
        rows.append(
            (
                snapshot.event_time_ns,
                *(engine.best or (np.nan,) * 4),
                *(sum(lots for _, lots in side[:count]) for side in (bids, asks) for count in (5, 10)),
                *(sum(ticks * lots for ticks, lots in side[:5]) * unit for side in (bids, asks)),
                trade.lots if trade and trade.taker_side == pb.TAKER_SIDE_BUY else 0,
                trade.lots if trade and trade.taker_side == pb.TAKER_SIDE_SELL else 0,
                trade.price_ticks if trade else np.nan,
                snapshot.book_time_ns,
            )
        )
    columns = ["time", "pb", "qb", "pa", "qa", "bid5", "bid10", "ask5", "ask10", "notional_bid", "notional_ask"]
    frame = pd.DataFrame(rows, columns=[*columns, "bought", "sold", "price", "book_time"])
    frame.index = pd.to_datetime(frame.pop("time"))
    return frame


def pandas_features(frame: pd.DataFrame) -> pd.DataFrame:
    """The feature set over a frame of `frame_of`, the way one writes it with pandas; the columns are `MF1.names`."""
    out = pd.DataFrame(index=frame.index)
    mid, depth = (frame.pb + frame.pa) / 2, frame.qb + frame.qa
    out["spread_bps"] = 1e4 * (frame.pa - frame.pb) / mid
    out["imbalance_l1"] = (frame.qb - frame.qa) / depth
    out["weighted_mid_bps"] = 1e4 * (frame.pa - frame.pb) * out.imbalance_l1 / 2 / mid
    for count in (5, 10):
        bid, ask = frame[f"bid{count}"], frame[f"ask{count}"]
        out[f"imbalance_l{count}"] = (bid - ask) / (bid + ask)
    last = frame[["pb", "qb", "pa", "qa"]].shift()
    flow = (frame.pb >= last.pb) * frame.qb - (frame.pb <= last.pb) * last.qb
    flow += (frame.pa >= last.pa) * last.qa - (frame.pa <= last.pa) * frame.qa
    changed = (frame[["pb", "qb", "pa", "qa"]] != last).any(axis=1) & last.pb.notna() & frame.pb.notna()
    changes = pd.DataFrame(
        {"flow": flow.where(changed, 0.0), "depth": depth.where(changed), "n": changed.astype(float)}
    )
    for width in ("100ms", "1s", "5s"):
        window = changes.rolling(width)
        out[f"ofi_{width}"] = (window.flow.sum() / (window.depth.mean() / 2)).fillna(0.0)
    trades = pd.DataFrame({"bought": frame.bought, "sold": frame.sold, "n": frame.price.notna().astype(float)})
    for seconds in (1, 5):
        sums = trades.rolling(f"{seconds}s").sum()
        out[f"trade_imbalance_{seconds}s"] = ((sums.bought - sums.sold) / (sums.bought + sums.sold)).fillna(0.0)
        out[f"trade_rate_{seconds}s"] = sums.n / seconds
    mids = mid.groupby(level=0).last()
    for seconds in (1, 5, 30):
        past = mids.reindex(frame.index - pd.Timedelta(seconds=seconds), method="ffill")
        out[f"ret_{seconds}s_bps"] = 1e4 * np.log(mid.to_numpy() / past.to_numpy())
    prices = frame.price.dropna()
    returns = np.log(prices / prices.shift()).dropna()
    last50 = returns.rolling(50, min_periods=1)
    moments = pd.DataFrame({"ret_mean_50": last50.mean(), "ret_std_50": last50.std(), "n_50": last50.count()})
    moments = moments.groupby(level=0).last().reindex(frame.index, method="ffill")
    for name in moments:
        out[name] = moments[name].to_numpy()
    grid = mids.resample("100ms", closed="right", label="right").last().ffill()
    squares = np.log(grid / grid.shift()) ** 2
    for seconds in (1, 5, 30):
        variance = squares.rolling(10 * seconds).sum()
        out[f"rv_{seconds}s_bps"] = 1e4 * np.sqrt(variance.reindex(frame.index, method="ffill").to_numpy())
    out["depth_l5_notional_bid"], out["depth_l5_notional_ask"] = frame.notional_bid, frame.notional_ask
    times = pd.Series(frame.index, index=frame.index)
    out["book_age_ms"] = (times - pd.to_datetime(frame.book_time)).dt.total_seconds() * 1e3
    out["trade_age_ms"] = (times - times.where(frame.price.notna()).ffill()).dt.total_seconds() * 1e3
    return out[list(MF1.names)]


def measure_pandas(events: Sequence[pb.MarketEvent]) -> list[Step]:
    """Both ways, for the busiest instrument."""
    ((busiest, _),) = Counter(event.instrument for event in events).most_common(1)
    frame = frame_of(event for event in events if event.instrument == busiest)
    began = time.perf_counter()
    computed = pandas_features(frame)
    seconds = time.perf_counter() - began
    assert computed.shape == (len(frame), len(MF1))
    each = 1e6 * seconds / len(frame)
    whole = Step("pandas: the whole frame, a row", len(frame), 0, seconds, each, each)
    ends = [frame.index[number] for number in np.linspace(len(frame) // 2, len(frame) - 1, _PUBLICATIONS).astype(int)]
    calls = [partial(pandas_features, frame.loc[end - _HISTORY : end]) for end in ends]
    return [whole, measured("pandas: the last 31 s, a vector", calls, 0)]
