"""How fast the price moves, by whom it is moved, and how urgent the caller finds it."""

import math

import numpy as np

from feature_cache.feature_set import CALLER, Feature, FeatureSet
from feature_cache.feature_sets import ComputedSet

SECOND = 1_000_000_000

NUMBERS = FeatureSet(
    "numbers",
    (
        Feature("spread_bps", "bps", "Copied from mf1.", 0.0, 20_000.0, source="mf1"),
        Feature("imbalance_l5", "", "Copied from mf1.", -1.0, 1.0, signed=True, source="mf1"),
        Feature("weighted_mid_bps", "bps", "Copied from mf1.", signed=True, source="mf1"),
        Feature("momentum_bps", "bps", "Log return of the last trade over one second.", signed=True),
        Feature("flow", "", "Bought less sold by takers within one second, of all.", -1.0, 1.0, signed=True),
        Feature("urgency", "", "The caller's own view.", 0.0, 1.0, source=CALLER),
    ),
)


class Numbers:
    """Computes `momentum_bps` and `flow`."""

    def __init__(self, instrument):
        self.trades = []  # (event time, price, signed lots)

    def on_event(self, event):
        kind = event.WhichOneof("event")
        if kind == "reset":
            self.trades.clear()
        if kind != "trade":
            return
        trade, now = event.trade, event.event_time_ns
        sign = {1: 1, 2: -1}.get(trade.taker_side, 0)
        self.trades.append((now, trade.price_ticks, sign * trade.lots, trade.lots))
        while self.trades[0][0] <= now - SECOND:
            del self.trades[0]

    def values(self):
        if not self.trades:
            return np.array([math.nan, math.nan], dtype=np.float32)
        first, last = self.trades[0][1], self.trades[-1][1]
        lots = sum(trade[3] for trade in self.trades)
        flow = sum(trade[2] for trade in self.trades) / lots if lots else math.nan
        return np.array([1e4 * math.log(last / first), flow], dtype=np.float32)


FEATURE_SETS = [ComputedSet(NUMBERS, Numbers)]
