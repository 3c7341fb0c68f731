"""Orders that are realistic, valid and reproducible."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from typing import Final

import pytest

from loadtest.generators.orders import STRATEGIES, OrderFlow
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.convert import OrderReader

INSTRUMENTS: Final = ("BTCUSDT.BINANCE", "ETHUSDT.BINANCE")
MIDS: Final = {"BTCUSDT.BINANCE": 60_123.45, "ETHUSDT.BINANCE": 2_543.21}


def take(n: int, mids: dict[str, float] = MIDS, *, seed: int = 1, ref_prefix: str = "") -> list[pb.Order]:
    flow = OrderFlow(INSTRUMENTS, seed=seed, ref_prefix=ref_prefix)
    return [flow.next(mids) for _ in range(n)]


def test_the_seed_fixes_the_orders() -> None:
    assert take(500) == take(500)
    assert take(500) != take(500, seed=2)


@pytest.mark.parametrize("mids", [MIDS, {}], ids=["with mids", "without"])
def test_the_server_accepts_every_order(mids: dict[str, float]) -> None:
    reader = OrderReader(INSTRUMENTS)
    for order in take(3_000, mids):
        reader.read(order)


def test_references_tell_orders_and_runs_apart() -> None:
    references = [order.order_ref for order in take(1_000, ref_prefix="run-7-")]
    assert len(set(references)) == 1_000
    assert all(reference.startswith("run-7-") for reference in references)


def test_every_instrument_side_and_strategy_is_there() -> None:
    orders = take(3_000)
    assert {order.instrument for order in orders} == set(INSTRUMENTS)
    assert {order.side for order in orders} == {pb.SIDE_BUY, pb.SIDE_SELL}
    for strategy in STRATEGIES:
        share = sum(order.strategy == strategy.name for order in orders) / len(orders)
        assert share == pytest.approx(strategy.weight, abs=0.05)


def test_limit_prices_are_near_the_mid_and_market_orders_as_common_as_the_strategy_says() -> None:
    orders = take(10_000)
    for strategy in STRATEGIES:
        own = [order for order in orders if order.strategy == strategy.name]
        limits = [order for order in own if order.HasField("limit_price")]
        assert 1 - len(limits) / len(own) == pytest.approx(strategy.market_share, abs=0.05)
        paying_bps = [
            (1 if order.side == pb.SIDE_BUY else -1) * 1e4 * (order.limit_price / MIDS[order.instrument] - 1)
            for order in limits
        ]
        assert statistics.mean(paying_bps) == pytest.approx(strategy.limit_offset_bps, abs=0.3)
        assert max(map(abs, paying_bps)) < 20


@pytest.mark.parametrize("mid", [math.nan, math.inf, 0.0, -1.0])
def test_an_instrument_without_a_price_gets_market_orders_only(mid: float) -> None:
    orders = take(500, {**MIDS, "ETHUSDT.BINANCE": mid})
    assert not any(order.HasField("limit_price") for order in orders if order.instrument == "ETHUSDT.BINANCE")
    assert any(order.HasField("limit_price") for order in orders if order.instrument == "BTCUSDT.BINANCE")


def test_mids_change_prices_and_sizes_and_nothing_else() -> None:
    for priced, unpriced in zip(take(1_000), take(1_000, {}), strict=True):
        for order in (priced, unpriced):
            order.ClearField("limit_price")
            order.ClearField("quantity")
        assert priced == unpriced


def test_sizes_are_what_the_strategy_trades_in_quote_currency() -> None:
    orders = take(20_000)
    for strategy in STRATEGIES:
        notionals = [o.quantity * MIDS[o.instrument] for o in orders if o.strategy == strategy.name]
        assert statistics.median(notionals) == pytest.approx(strategy.notional, rel=0.25)


def test_a_strategy_sends_runs_of_one_instrument_and_side() -> None:
    """A coin flip for each order would repeat both a quarter of the time."""
    own = [order for order in take(10_000) if order.strategy == "execution-twap"]
    repeats = [(a.instrument, a.side) == (b.instrument, b.side) for a, b in pairwise(own)]
    assert sum(repeats) / len(repeats) > 0.85


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one instrument"):
        OrderFlow(())
    with pytest.raises(ValueError, match="41 characters"):
        OrderFlow(INSTRUMENTS, ref_prefix="x" * 41)
