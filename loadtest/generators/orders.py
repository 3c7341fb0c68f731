"""A seeded flow of orders as execution systems send them.

A strategy works one parent order at a time: it picks an instrument and a side and sends the parent in slices of similar
size until it is done. So sides and instruments come in runs, as in a real market, and not like coin flips. Sizes are
log-normal in quote currency.

`python -m loadtest.generators.orders INSTRUMENT` writes one of them to standard output as the body of a gRPC call of
`Decide`.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.generators.load import framed
from pretrade.decision.v1.decision_pb2 import SIDE_BUY, SIDE_SELL, DecideRequest, Order, Side


@dataclass(frozen=True, slots=True)
class Strategy:
    """How one kind of strategy trades."""

    name: str
    weight: float
    """Its share of all orders, relative to the others' weights."""
    slices: float
    """Mean number of orders that a parent is cut into."""
    market_share: float
    """Share of market orders, in [0, 1]."""
    limit_offset_bps: float
    """Mean distance of a limit price from the mid in basis points; positive on the paying side."""
    notional: float
    """Median size of an order in quote currency."""
    reduce_only_share: float
    """Share of parents that close a position, in [0, 1]."""


STRATEGIES: Final = tuple(
    Strategy(**strategy) for strategy in json.loads(Path(__file__).with_name("strategies.json").read_bytes())
)
"""The same as in the k6 scenarios."""

_WEIGHTS: Final = [strategy.weight for strategy in STRATEGIES]
_LONGEST_PREFIX: Final = 40
"""Leaves room for the number within the contract's 64 characters."""
_SIZE_SIGMA: Final = 0.8
"""Standard deviation of the logarithm of a size."""
_SLICE_SIGMA: Final = 0.1
"""The same for the slices of one parent."""
_OFFSET_SIGMA_BPS: Final = 1.5
_QUANTITY_WITHOUT_MID: Final = 0.05
"""Median quantity in base asset where no mid tells what it is worth."""


@dataclass(slots=True)
class _Parent:
    instrument: str
    side: Side.ValueType
    size: float
    """Size of a slice, as a multiple of the strategy's median."""
    reduce_only: bool
    slices_left: int


class OrderFlow:
    """Makes one order after another; the same arguments and mids give the same orders.

    Args:
        instruments: `SYMBOL.VENUE` each, at least one; traded equally often.
        seed: Of everything random.
        ref_prefix: Put before the running number in `order_ref`, so that runs can be told apart; at most 40 characters.

    Raises:
        ValueError: There are no instruments, or the prefix is too long.
    """

    def __init__(self, instruments: Sequence[str], *, seed: int = 1, ref_prefix: str = "") -> None:
        if not instruments:
            raise ValueError("orders need at least one instrument")
        if len(ref_prefix) > _LONGEST_PREFIX:
            raise ValueError(f"ref_prefix has {len(ref_prefix)} characters, more than {_LONGEST_PREFIX}")
        self._instruments = tuple(instruments)
        self._random = random.Random(seed)
        self._ref_prefix = ref_prefix
        self._made = 0
        self._parents: dict[str, _Parent] = {}

    def next(self, mids: Mapping[str, float]) -> Order:
        """The next order.

        Args:
            mids: Current mids in quote currency. An instrument without one, or with one that is not a price, gets a
                market order: a limit far from the market would say nothing about the service.
        """
        strategy = self._random.choices(STRATEGIES, _WEIGHTS)[0]
        parent = self._parents.get(strategy.name)
        if parent is None or parent.slices_left == 0:
            parent = self._parents[strategy.name] = self._new_parent(strategy)
        parent.slices_left -= 1
        mid = mids.get(parent.instrument, math.nan)
        return self._slice(strategy, parent, mid if 0 < mid < math.inf else None)

    def _new_parent(self, strategy: Strategy) -> _Parent:
        rng = self._random
        # Geometric, at least 1, with the wanted mean.
        slices = 1 if strategy.slices == 1 else 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / strategy.slices))
        return _Parent(
            instrument=rng.choice(self._instruments),
            side=rng.choice((SIDE_BUY, SIDE_SELL)),
            size=rng.lognormvariate(0, _SIZE_SIGMA),
            reduce_only=rng.random() < strategy.reduce_only_share,
            slices_left=slices,
        )

    def _slice(self, strategy: Strategy, parent: _Parent, mid: float | None) -> Order:
        rng = self._random
        self._made += 1
        median = _QUANTITY_WITHOUT_MID if mid is None else strategy.notional / mid
        order = Order(
            order_ref=f"{self._ref_prefix}{self._made}",
            instrument=parent.instrument,
            side=parent.side,
            quantity=_rounded(median * parent.size * rng.lognormvariate(0, _SLICE_SIGMA), 4),
            strategy=strategy.name,
            reduce_only=parent.reduce_only,
        )
        # Drawn whether used or not, so that the flow is the same with and without mids but for its prices.
        is_market = rng.random() < strategy.market_share
        offset_bps = rng.gauss(strategy.limit_offset_bps, _OFFSET_SIGMA_BPS)
        if mid is not None and not is_market:
            paying = 1 if parent.side == SIDE_BUY else -1
            order.limit_price = _rounded(mid * (1 + paying * offset_bps / 1e4), 7)
        return order


def _rounded(value: float, digits: int) -> float:
    """Rounded to significant digits, like a lot or a tick."""
    return float(f"{value:.{digits}g}")


if __name__ == "__main__":
    one = OrderFlow([sys.argv[1]], ref_prefix="h2load-").next({})
    sys.stdout.buffer.write(framed(DecideRequest(order=one)))
