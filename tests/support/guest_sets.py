"""A feature set of a guest: one feature of `mf1`, one of its own, one that callers bring."""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_cache import feature_sets
from feature_cache.feature_set import CALLER, Feature, FeatureSet
from feature_cache.feature_sets import FeatureSets, Registered
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


def know(monkeypatch: pytest.MonkeyPatch, *found: Registered) -> None:
    """Has this process know these sets besides `mf1` until the test's end."""
    monkeypatch.setattr(feature_sets, "_loaded", {None: FeatureSets(found)})
