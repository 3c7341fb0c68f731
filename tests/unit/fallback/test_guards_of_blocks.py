"""The guards of a block against `apply`, order by order: whatever the orders, the scores, the limits and the state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.both_ways import DOMAIN
from support.cases import Clock
from support.columns import Columns

from fallback.block import View
from fallback.budget import Budget
from fallback.guards import Guarded, Guards, GuardSettings, OrderLimit
from fallback.model_limits import NO_LIMITS, UNKNOWN, LimitGuards, ModelLimits, limits_of
from fallback.order import Order
from feature_cache import features
from feature_cache.store.codec import BookState, FeatureSnapshot
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.rows import Scored
from server.inference.wire import ModelIdentity

UNIX_NOW = 1_800_000_000
NAMES = ("BTCUSDT.BINANCE", "ETHUSDT.BINANCE", "XRPUSDT.BINANCE")
STUCK = DOMAIN | {"most_same": [0, 0]}
"""Of a model to which a value is stuck that is the same twice while the other one changes."""


@dataclasses.dataclass(frozen=True)
class Market:
    """What is known of an instrument."""

    mid: float
    event_time_ns: int
    imbalance: float
    volatility: float

    def view(self, instrument: str, side: pb.Side.ValueType) -> View:
        values = np.zeros(features.N_FEATURES, np.float32)
        values[[features.INDEX["imbalance_l1"], features.INDEX["rv_5s_bps"]]] = self.imbalance, self.volatility
        at = self.event_time_ns
        snapshot = FeatureSnapshot(instrument, 1, at, at, at, at, 0, self.mid, self.mid, BookState.VALID, values)
        turned = features.MF1.for_sell(values) if side == pb.SIDE_SELL else values
        return View(snapshot, 0.1, self.mid, turned, turned.tobytes())


ABOUT_A_HUNDRED = st.floats(99.0, 101.0)
PRICES = st.one_of(st.just(math.nan), ABOUT_A_HUNDRED, st.sampled_from((100.5, 99.5, 1e-300, 1e300)))
MIDS = st.one_of(ABOUT_A_HUNDRED, st.sampled_from((math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-300, 1e300)))
ORDERS = st.builds(
    lambda instrument, side, quantity, price, strategy, reducing: Order(
        b"", instrument, side, quantity, price, strategy, reducing, None
    ),
    st.sampled_from(NAMES),
    st.sampled_from((pb.SIDE_BUY, pb.SIDE_SELL)),
    st.one_of(st.floats(0.5, 20.0), st.sampled_from((1.0, 10.0, 1e-300, 1e300))),
    PRICES,
    st.sampled_from(("twap", "vwap")),
    st.booleans(),
)
MARKETS = st.builds(
    Market,
    st.one_of(st.just(100.0), MIDS),
    st.sampled_from((0, 1, (UNIX_NOW - 1) * 10**9, UNIX_NOW * 10**9, (UNIX_NOW + 86_400) * 10**9)),
    st.sampled_from((0.1, 0.1, -0.5, 1.5, math.nan)),
    st.sampled_from((1.0, 1.0, 40.0, 41.0)),
)
SETTINGS = st.builds(
    GuardSettings,
    price_collar_bps=st.sampled_from((None, 50.0, 100.0, 1e-9)),
    max_notional=st.sampled_from((None, 1_000.0, 100.0, 1e-300)),
    limits=st.sampled_from(
        (
            (),
            (),
            (OrderLimit(instrument=NAMES[0], max_quantity=2.0), OrderLimit(max_quantity=10.0, max_notional=2_000.0)),
            (
                OrderLimit(strategy="vwap", max_notional=50.0),
                OrderLimit(strategy="vwap", instrument=NAMES[1], max_quantity=1.0),
            ),
        )
    ),
    max_decisions_per_second=st.sampled_from((None, None, 0.5, 3.0)),
    degraded_orders=st.sampled_from(("any", "reduce_only")),
    model_grace_days=st.sampled_from((0.0, 1.0)),
)
STATES = st.sampled_from(
    (
        admin_pb2.TRADING_STATE_ACTIVE,
        admin_pb2.TRADING_STATE_ACTIVE,
        admin_pb2.TRADING_STATE_REDUCING,
        admin_pb2.TRADING_STATE_HALTED,
        admin_pb2.TRADING_STATE_UNSPECIFIED,
    )
)
LIMITS = st.sampled_from(
    (
        None,
        NO_LIMITS,
        UNKNOWN,
        ModelLimits(0.44, 0.6, has_band=True),
        limits_of({"domain": DOMAIN}),
        limits_of({"domain": STUCK, "band": {"low": 0.44, "high": None}}),
    )
)
SCORES = st.sampled_from([float(np.float32(one)) for one in (0.9, 0.1, 0.44, 0.45, 0.5, 0.6, 0.61, 0.0, 1.0)])


def block_of(orders: Sequence[Order], markets: Sequence[Market], scores: Sequence[float], expires_at: int) -> Columns:
    """A block that one model has scored."""
    known: dict[tuple[str, int], View] = {}
    for order in orders:
        key = order.instrument, order.side
        known.setdefault(key, markets[NAMES.index(order.instrument)].view(*key))
    made = Columns(orders, [known[order.instrument, order.side] for order in orders], Budget(1_000.0, 1_000.05, 0.0))
    model = ModelIdentity("champion", "aa" * 8, 0.5, expires_at)
    for place, score in enumerate(scores):
        made.put(place, Scored(score, model))
    made.answered(pb.SOURCE_PRIMARY, model, 0.001)
    return made


def in_columns(guards: Guards, block: Columns) -> dict[int, Guarded]:
    """What the guards say of the orders that stay in the block, by place."""
    leave = guards.settle_block(block)
    return {place: (block.actions[place], block.reasons_of(place)) for place in range(len(block)) if place not in leave}


def alone(guards: Guards, block: Columns) -> tuple[list[Guarded], list[list[pb.Degradation.ValueType]]]:
    """What `apply` says of each order by itself, and the degradations that go with it."""
    said, degradations = [], []
    for case, answer in block.each():
        said.append(guards.apply(case, answer))
        degradations.append(list(case.degradations))
    return said, degradations


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_block_is_guarded_as_each_of_its_orders_is_alone(data: st.DataObject) -> None:
    pairs = data.draw(st.lists(st.tuples(ORDERS, SCORES), min_size=1, max_size=12), label="orders")
    markets = data.draw(st.tuples(*[MARKETS] * len(NAMES)), label="markets")
    limits, state = data.draw(LIMITS, label="limits"), data.draw(STATES, label="state")
    configured = data.draw(SETTINGS, label="settings")
    expires_at = data.draw(st.sampled_from((0, 0, 1, UNIX_NOW, UNIX_NOW + 1)), label="expires at")
    switches = data.draw(st.tuples(st.booleans(), st.booleans()), label="switches")

    def made() -> Guards:
        of_models = None
        if limits is not None:
            of_models = LimitGuards(lambda _: limits, lambda: switches[0], lambda: switches[1])
        return Guards(configured, lambda: state, Clock(), lambda: UNIX_NOW, of_models)

    block = block_of([order for order, _ in pairs], markets, [score for _, score in pairs], expires_at)
    expected, degradations = alone(made(), block)
    found = in_columns(made(), block)
    assert set(found) == {place for place, one in enumerate(degradations) if not one}, "no other order leaves its block"
    if configured.max_decisions_per_second is not None and len(found) < len(block):
        # Those that leave take from the rate after those that stay: who is refused is another, how many are not.
        assert all(without_rate(said) == without_rate(expected[place]) for place, said in found.items())
        return
    for place, said in found.items():
        assert said == expected[place], f"order {place}"


def without_rate(guarded: Guarded) -> Guarded:
    """What the guards say of an order while its strategy has not reached its rate."""
    _, reasons = guarded
    if pb.REASON_CODE_STRATEGY_RATE not in reasons:
        return guarded
    return pb.ACTION_TRADE, [one for one in reasons if one != pb.REASON_CODE_STRATEGY_RATE]
