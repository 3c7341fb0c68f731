"""What the market makes of pairs of scores."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from support.cases import Clock

from feature_cache import features
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.markouts import Markouts
from server.inference.shadow import Opinion, Pair
from server.models.markout import Markout

INSTRUMENT = "BTCUSDT.BINANCE"


def pair(decision_id: str = "one", side: pb.Side.ValueType = pb.SIDE_BUY, mid: float = 100.0) -> Pair:
    return Pair(
        decision_id, INSTRUMENT, side, mid, Opinion("aa" * 8, 0.9, 0.5), Opinion("bb" * 8, 0.2, 0.4), False, 0.0015, 1
    )


class Market:
    """A feature cache whose vectors the test sends, and the outcomes that were heard of."""

    def __init__(self) -> None:
        self.clock, self.sequence = Clock(), 0
        self.cache = FeatureCache(
            "redis://unused", FeatureCacheSettings(), (INSTRUMENT,), monotonic=self.clock, wall_ns=self.wall_ns
        )
        self.heard: list[tuple[str, bool]] = []
        self.markouts = Markouts(self.cache, self.clock)
        self.markouts.on_outcome(lambda one, eligible: self.heard.append((one.decision_id, eligible)))

    def wall_ns(self) -> int:
        return int((1_700_000_000 + self.clock.now) * 1e9)

    def quote(self, mid: float, half_spread: float = 0.5) -> None:
        """A vector of this moment."""
        self.sequence += 1
        now = self.wall_ns()
        values = np.zeros(features.N_FEATURES, dtype=np.float32)
        snapshot = FeatureSnapshot(
            INSTRUMENT,
            self.sequence,
            now,
            now,
            now,
            now,
            0,
            mid - half_spread,
            mid + half_spread,
            BookState.VALID,
            values,
        )
        assert self.cache.accept(encode(snapshot))

    def pass_by(self, seconds: float) -> None:
        self.clock.now += seconds


def test_the_market_five_seconds_later_says_what_was_eligible() -> None:
    market = Market()
    for decision_id, side in (("buy", pb.SIDE_BUY), ("sell", pb.SIDE_SELL)):
        market.markouts.add(pair(decision_id, side, mid=100.0))
    market.pass_by(4.9)
    market.quote(100.02)
    market.markouts.settle()
    assert market.heard == []
    market.pass_by(0.2)
    market.markouts.settle()
    assert market.heard == [("buy", True), ("sell", False)], "two basis points up"


def test_a_basis_point_against_an_order_is_still_eligible() -> None:
    market = Market()
    market.markouts.add(pair("just", mid=100.0))
    market.pass_by(5.0)
    market.quote(99.9905)
    market.markouts.settle()
    assert market.heard == [("just", True)]


def test_the_worst_markout_itself_is_eligible() -> None:
    market = Market()
    market.markouts.begin(Markout(worst_bps=0.0))
    market.markouts.add(pair("unmoved", mid=100.0))
    market.pass_by(5.0)
    market.quote(100.0)
    market.markouts.settle()
    assert market.heard == [("unmoved", True)]


def test_without_a_fresh_book_or_a_mid_nothing_is_said() -> None:
    market = Market()
    for impossible in (math.nan, math.inf, 0.0, -1.0):
        market.markouts.add(pair("unknown when decided", mid=impossible))
    market.markouts.add(pair("unknown since"))
    market.quote(100.0)
    market.pass_by(6.5)
    market.markouts.settle()
    assert (market.heard, market.markouts.unknown) == ([], 1)
    market.markouts.add(pair("impossible since"))
    market.pass_by(5.0)
    market.quote(math.inf)
    market.markouts.settle()
    assert (market.heard, market.markouts.unknown) == ([], 2)


def test_the_horizon_and_the_worst_markout_are_those_of_the_label() -> None:
    market = Market()
    market.markouts.begin(Markout(horizon_seconds=0.5, worst_bps=-0.4))
    market.markouts.add(pair("buy", pb.SIDE_BUY))
    market.markouts.add(pair("sell", pb.SIDE_SELL))
    market.quote(99.995)
    market.pass_by(0.4)
    market.markouts.settle()
    assert market.heard == []
    market.pass_by(0.1)
    market.markouts.settle()
    assert market.heard == [("buy", False), ("sell", True)], "half a basis point down"


@pytest.mark.parametrize(
    ("price", "outcomes"),
    [("mid", [("buy", True), ("sell", True)]), ("touch", [("buy", False), ("sell", False)])],
)
def test_an_order_is_done_when_it_reaches_the_market_and_at_what_the_label_says(
    price: Literal["mid", "touch"], outcomes: list[tuple[str, bool]]
) -> None:
    market = Market()
    market.markouts.begin(Markout(horizon_seconds=1.0, delay_seconds=0.2, price=price))
    market.markouts.add(pair("buy", pb.SIDE_BUY, mid=90.0))
    market.markouts.add(pair("sell", pb.SIDE_SELL, mid=110.0))
    market.quote(100.0, half_spread=0.02)
    market.pass_by(0.2)
    market.markouts.settle()
    market.pass_by(0.9)
    market.quote(100.0)
    market.markouts.settle()
    assert market.heard == []
    market.pass_by(0.1)
    market.markouts.settle()
    assert market.heard == outcomes


def test_an_order_that_reaches_a_market_nobody_knows_has_no_outcome() -> None:
    market = Market()
    market.markouts.begin(Markout(horizon_seconds=1.0, delay_seconds=0.2))
    market.markouts.add(pair())
    market.pass_by(0.2)
    market.markouts.settle()
    market.quote(100.0)
    market.pass_by(1.0)
    market.markouts.settle()
    assert (market.heard, market.markouts.unknown) == ([], 1)


def test_pairs_that_wait_for_another_label_are_forgotten() -> None:
    market = Market()
    market.markouts.add(pair())
    market.markouts.begin(Markout(horizon_seconds=1.0))
    market.pass_by(5.0)
    market.quote(100.0)
    market.markouts.settle()
    assert market.heard == []
