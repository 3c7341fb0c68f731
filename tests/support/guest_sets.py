"""Feature sets of a guest: one with features of `mf1`, its own and the callers', and one that a recording has whole."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_cache import feature_sets
from feature_cache.feature_set import CALLER, Feature, FeatureSet
from feature_cache.feature_sets import ComputedSet, FeatureSets, Registered
from pretrade.market.v1 import market_pb2 as pb

MIXED: Final = FeatureSet(
    "mixed",
    (
        Feature("weighted_mid_bps", "bps", "Copied from mf1.", -10_000.0, 10_000.0, signed=True, source="mf1"),
        Feature("trades", "", "Trades since the start.", lowest=0.0),
        Feature("urgency", "", "The caller's own view.", 0.0, 1.0, source=CALLER),
    ),
)


class Trades:
    """Counts trades."""

    def __init__(self, instrument: str) -> None:
        self.count = 0

    def on_event(self, event: pb.MarketEvent) -> None:
        self.count += event.WhichOneof("event") == "trade"

    def values(self) -> NDArray[np.float32]:
        return np.array([self.count], dtype=np.float32)


REGISTERED: Final = Registered(MIXED, Trades, "the tests")

RECORDED: Final = FeatureSet(
    "recorded",
    (
        Feature("imbalance_l1", "", "Copied from mf1.", -1.0, 1.0, signed=True, source="mf1"),
        Feature("bought", "", "Lots of the last trade, less than 0 where the taker sold.", signed=True),
        Feature("weighted_mid_bps", "bps", "Copied from mf1.", -10_000.0, 10_000.0, signed=True, source="mf1"),
        Feature("trades", "", "Trades since the start.", lowest=0.0, source="mixed"),
        Feature("book_age_ms", "ms", "Copied from mf1.", lowest=0.0, is_age=True, source="mf1"),
        Feature("quote_age_ms", "ms", "Since the newest event that is no trade.", lowest=0.0, is_age=True),
    ),
)


class Bought:
    """Computes `bought` and `quote_age_ms`."""

    def __init__(self, instrument: str) -> None:
        self.lots = float("nan")
        self.quoted_ns = self.now_ns = 0

    def on_event(self, event: pb.MarketEvent) -> None:
        self.now_ns = event.event_time_ns
        if event.WhichOneof("event") == "trade":
            self.lots = event.trade.lots * (1 if event.trade.taker_side == pb.TAKER_SIDE_BUY else -1)
        else:
            self.quoted_ns = self.now_ns

    def values(self) -> NDArray[np.float32]:
        return np.array([self.lots, max(0, self.now_ns - self.quoted_ns) / 1e6], dtype=np.float32)


FILE: Final = Path(__file__)
"""This one: a process of a set finds them here."""
FEATURE_SETS: Final = [ComputedSet(MIXED, Trades), ComputedSet(RECORDED, Bought)]
ALL: Final = (REGISTERED, Registered(RECORDED, Bought, "the tests"))


def know(monkeypatch: pytest.MonkeyPatch, *found: Registered) -> None:
    """Has this process know these sets besides `mf1` until the test's end."""
    monkeypatch.setattr(feature_sets, "_loaded", {None: FeatureSets(found)})
