"""The feature set `mf1`, which this product computes itself from order book and trades.

The formulas are in `engine/engine.py`. Rules, guards and freshness use this set whatever a model takes.
"""

from __future__ import annotations

from typing import Final

from feature_cache.feature_set import ROW, Feature, FeatureSet

_BID: Final = "depth_l5_notional_bid"
_ASK: Final = "depth_l5_notional_ask"

MF1: Final = FeatureSet(
    "mf1",
    (
        # Pa - Pb is at most twice the mid, and the weighted mid lies between Pb and Pa.
        Feature("spread_bps", "bps", "Best ask less best bid, over the mid.", lowest=0.0, highest=20_000.0),
        Feature(
            "weighted_mid_bps",
            "bps",
            "The mid weighted by the sizes of the best levels, less the mid.",
            lowest=-10_000.0,
            highest=10_000.0,
            signed=True,
        ),
        Feature("imbalance_l1", "", "Bid less ask size of the best level, over their sum.", -1.0, 1.0, signed=True),
        Feature("imbalance_l5", "", "The same over the first five levels.", -1.0, 1.0, signed=True),
        Feature("imbalance_l10", "", "The same over the first ten levels.", -1.0, 1.0, signed=True),
        Feature("ofi_100ms", "", "Order flow imbalance at the best level, last 100 ms.", signed=True),
        Feature("ofi_1s", "", "Order flow imbalance at the best level, last second.", signed=True),
        Feature("ofi_5s", "", "Order flow imbalance at the best level, last 5 s.", signed=True),
        Feature("trade_imbalance_1s", "", "Bought less sold volume over their sum, last 1 s.", -1.0, 1.0, signed=True),
        Feature("trade_imbalance_5s", "", "Bought less sold volume over their sum, last 5 s.", -1.0, 1.0, signed=True),
        Feature("trade_rate_1s", "1/s", "Trades, last second.", lowest=0.0),
        Feature("trade_rate_5s", "1/s", "Trades, last 5 s.", lowest=0.0),
        Feature("ret_1s_bps", "bps", "Log return of the mid, last second.", signed=True),
        Feature("ret_5s_bps", "bps", "Log return of the mid, last 5 s.", signed=True),
        Feature("ret_30s_bps", "bps", "Log return of the mid, last 30 s.", signed=True),
        Feature("ret_mean_50", "", "Mean log return from trade to trade, last 50.", signed=True),
        Feature("ret_std_50", "", "Their standard deviation.", lowest=0.0),
        Feature("n_50", "", "How many of those 50 are known.", 0.0, 50.0),
        Feature("rv_1s_bps", "bps", "Realised volatility of the mid, last second.", lowest=0.0),
        Feature("rv_5s_bps", "bps", "Realised volatility of the mid, last 5 s.", lowest=0.0),
        Feature("rv_30s_bps", "bps", "Realised volatility of the mid, last 30 s.", lowest=0.0),
        Feature(_BID, "quote currency", "Price times size, first five bids.", lowest=0.0, swapped_with=_ASK),
        Feature(_ASK, "quote currency", "Price times size, first five asks.", lowest=0.0, swapped_with=_BID),
        Feature("book_age_ms", "ms", "Since the newest book or quote event.", lowest=0.0, is_age=True),
        Feature("trade_age_ms", "ms", "Since the newest trade.", lowest=0.0, is_age=True),
    ),
)

NAMES: Final = MF1.names
N_FEATURES: Final = len(MF1)
INDEX: Final = MF1.index

__all__ = ["INDEX", "MF1", "NAMES", "N_FEATURES", "ROW"]
