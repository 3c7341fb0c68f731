"""Guards say of a block what they say of each of its orders by itself."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import Clock

from fallback.block import Block, View
from fallback.budget import Budget
from fallback.guards import Guards, GuardSettings, OrderLimit
from fallback.model_limits import UNKNOWN, LimitGuards, ModelLimits
from fallback.order import Order
from feature_cache.features import MF1
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb

UNIX_NOW = 1_800_000_000
STATES = (
    admin_pb2.TRADING_STATE_ACTIVE,
    admin_pb2.TRADING_STATE_ACTIVE,
    admin_pb2.TRADING_STATE_REDUCING,
    admin_pb2.TRADING_STATE_HALTED,
)
NAMES = ("A.X", "B.X")
STRATEGIES = ("twap", "vwap")


class Scores(Block):
    """A block that nobody waits for."""

    def complete(self) -> None:
        pass

    def is_left(self) -> bool:
        return False

    def is_gone(self, place: int) -> bool:
        return False

    def put_failure(self, place: int, result: Any) -> None:
        raise AssertionError("every order has a score")


def view_of(name: str, mid: float, event_time_ns: int) -> View:
    values = np.zeros(len(MF1), dtype=np.float32)
    snapshot: Any = SimpleNamespace(instrument=name, event_time_ns=event_time_ns, values=values)
    return View(snapshot, 0.0, mid, values, values.tobytes())


orders = st.builds(
    Order,
    st.just(b""),
    st.sampled_from(NAMES),
    st.sampled_from((pb.SIDE_BUY, pb.SIDE_SELL)),
    st.sampled_from((0.5, 1.0, 3.0, 100.0)),
    st.sampled_from((math.nan, 99.0, 99.6, 100.0, 100.4, 101.0)),
    st.sampled_from(STRATEGIES),
    st.booleans(),
    st.none(),
)
rows = st.lists(
    st.tuples(
        orders,
        st.sampled_from((100.0, 100.0, 100.0, 0.0, math.nan, math.inf)),
        st.sampled_from((UNIX_NOW - 10, UNIX_NOW, UNIX_NOW + 10)),
        st.sampled_from((0.1, 0.5, 0.75, 0.9)),
    ),
    min_size=1,
    max_size=12,
)
instruments, strategies = st.sampled_from((None, NAMES[0])), st.sampled_from((None, STRATEGIES[0]))
order_limits = st.lists(
    st.one_of(
        st.builds(OrderLimit, instrument=instruments, strategy=strategies, max_quantity=st.just(2.0)),
        st.builds(OrderLimit, instrument=instruments, strategy=strategies, max_notional=st.sampled_from((150.0, 1e6))),
    ),
    max_size=3,
    unique_by=lambda limit: (limit.instrument, limit.strategy),
)
guard_settings = st.builds(
    GuardSettings,
    price_collar_bps=st.sampled_from((None, 50.0)),
    max_notional=st.sampled_from((None, None, 200.0)),
    limits=order_limits.map(tuple),
    max_decisions_per_second=st.sampled_from((None, None, None, 1.0, 3.0)),
    model_grace_days=st.sampled_from((0.0, 1.0)),
)
known = st.sampled_from((ModelLimits(), ModelLimits(0.45, 0.55, has_band=True), UNKNOWN))


@settings(max_examples=500)
@given(
    rows,
    guard_settings,
    st.sampled_from(STATES),
    known,
    st.sampled_from((0, UNIX_NOW, UNIX_NOW - 86_400)),
    st.booleans(),
)
def test_they_object_to_an_order_in_a_block_as_to_one_alone(
    given_rows: list[tuple[Order, float, int, float]],
    made_with: GuardSettings,
    state: admin_pb2.TradingState.ValueType,
    of_model: ModelLimits,
    expires_at: int,
    has_models: bool,
) -> None:
    def guards() -> Guards:
        models = LimitGuards(lambda _: of_model, lambda: True, lambda: True) if has_models else None
        return Guards(made_with, lambda: state, Clock(), lambda: UNIX_NOW, models)

    views = [view_of(order.instrument, mid, seconds * 10**9) for order, mid, seconds, _ in given_rows]
    block = Scores([order for order, *_ in given_rows], views, Budget(0.0, 10.0))
    block.results = [
        SimpleNamespace(score=score, batch_rows=1, batch_index=0, queued_seconds=0.0, call_parent="", part_scores=())
        for *_, score in given_rows
    ]
    model: Any = SimpleNamespace(name="champion", version="v1", threshold=0.5, expires_at=expires_at, parts=())
    block.answered(pb.SOURCE_PRIMARY, model, 0.001)
    alone = guards().settle_block(block)
    assert len(alone) in (0, len(views) if has_models and of_model is UNKNOWN else 0)
    by_itself = guards()
    expected = [
        None if place in alone else by_itself.apply(block.case(place), block.answer(place))
        for place in range(len(views))
    ]
    kept = [place for place in range(len(views)) if place % 3 and place not in alone]
    for places in (range(len(views)), kept):
        if places is kept:
            block.keep(kept)
        found = [(block.actions[place], block.reasons_of(place)) for place in range(len(block))]
        assert [one for place, one in zip(places, found, strict=True) if place not in alone] == [
            expected[place] for place in places if place not in alone
        ]
