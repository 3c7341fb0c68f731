"""A simulated exchange: who sends orders to one book, and when.

- *Makers* follow Santa Fe's book: limit orders and cancellations arrive at random at every level, more of them near the
  touch. They do not see the value. They believe in a price that lags it, and that every trade moves (Glosten and
  Milgrom): a gap after a trade is closed from the side on which they believe the price to be, and orders on the wrong
  side of that price are cancelled sooner.
- *Takers* arrive as a Hawkes process. A parent order is split into a number of children with a power-law tail, of one
  side. Parents are *informed* in part: those see the value, and take what is offered on its wrong side. The others
  choose their side at random.
- Sizes are log-uniform with a power-law tail.

M. G. Daniels and others, "Quantitative model of price diffusion and market friction based on trading as a mechanistic
random process", Physical Review Letters 90 (2003). L. R. Glosten and P. R. Milgrom, "Bid, ask and transaction prices in
a specialist market with heterogeneously informed traders", Journal of Financial Economics 14 (1985). F. Lillo, S. Mike
and J. D. Farmer, "Theory for long memory in supply and demand", Physical Review E 71 (2005).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final, NamedTuple

from feature_cache.sources.simulated.book import Fill, Side
from feature_cache.sources.simulated.hawkes import Hawkes, Kernel
from feature_cache.sources.simulated.value import Value

LEVELS: Final = 40
"""Levels that each side has at least; no taker takes the last of them."""
MOST_LEVELS: Final = 160
_LONGEST_STEP: Final = 0.01  # seconds, after which the value is looked at again
_LIVELIEST: Final = 8.0  # times the mean of the takers' intensity, above which makers are no quicker
_CRASH_TAKERS: Final = 150.0  # sales per second of a crash
_CRASH_POSTING: Final = 0.05  # of the makers' usual orders
_CRASH_CANCELLING: Final = 4.0  # times the usual cancellations


class Sizes(NamedTuple):
    """Log-uniform between the smallest and the body's end; in a share of cases a power-law tail from there on."""

    smallest: float
    body: float
    largest: float
    tail_share: float
    tail: float

    def draw(self, source: random.Random) -> float:
        """One size, in units of the instrument's typical size."""
        u = source.random()
        if u >= self.tail_share:
            return self.smallest * math.pow(self.body / self.smallest, (u - self.tail_share) / (1 - self.tail_share))
        return min(self.largest, self.body * math.pow(max(u, 1e-12) / self.tail_share, -1 / self.tail))


_TAKER_SIZES: Final = Sizes(0.00007, 0.1, 15.0, 0.052, 0.947)
_TOUCH_SIZES: Final = Sizes(0.00056, 1.7, 8.0, 0.3, 1.5)
_DEEP_SIZES: Final = Sizes(0.0001, 0.195, 8.0, 0.06, 1.3)


@dataclass(frozen=True, slots=True)
class Flow:
    """Rates per second, distances in basis points, sizes in units of the instrument's typical size."""

    takers: float = 1.7
    """Takers' orders that no other one brings."""
    kernels: tuple[Kernel, ...] = (Kernel(0.551, 150.0), Kernel(0.231, 8.0), Kernel(0.138, 0.5))
    news_takers: float = 10.0
    """Takers whom a jump of one basis point brings at once."""
    informed: float = 0.1
    """Share of the parents that see the value, where that is not far away."""
    informed_scale: float = 2.03
    """At this distance of the value from the mid, 63 % of the others are informed, too."""
    informed_margin: float = 0.5
    """An informed trader trades when the value is farther than this from the mid."""
    children: float = 0.968
    """Tail of a parent's number of children: P(number > n) = n^−tail."""
    most_children: int = 300
    parents: int = 6
    """Parents at work at a time; a new one takes the place of the oldest."""
    newest: float = 0.33
    """Probability that the next child is that of the parent which sent the last one."""
    new_parent: float = 0.2
    """Probability that a taker is a new parent although others are at work."""
    patience: float = 0.95
    """At an imbalance of 1 against it, the share of the uninformed children that is not sent."""
    buyers: float = 0.5
    """Share of the uninformed parents that buy."""
    taker_sizes: Sizes = _TAKER_SIZES
    informed_size: float = 8.8
    """An informed order is at least a random share of this."""

    touch: float = 50.0
    """Limit orders at the two best prices."""
    touch_sizes: Sizes = _TOUCH_SIZES
    touch_cancel: float = 4.5
    """Cancellations of each order at a best price but one."""
    inside: float = 1500.0
    """Limit orders while there is room between the best prices."""
    fill: float = 0.45
    """Probability that such an order leaves no room."""
    deep: float = 90.0
    """Limit orders behind the best prices, both sides."""
    deep_sizes: Sizes = _DEEP_SIZES
    deep_distance: float = 3.26
    """Distance d behind the best price: P(d > x) = (1 + x / distance)^−1.5."""
    deep_cancel: float = 0.3
    """Cancellations of each level behind the best."""
    calm_share: float = 0.4
    """Share of the makers' rates that does not grow with the takers'."""

    belief_lag: float = 0.03
    """Seconds that the makers' price is behind the value."""
    impact: float = 0.8
    """Share of a trade's way through the book that the makers believe in."""
    impact_decay: float = 8.0
    """Seconds after which they believe less of it, by the factor e."""
    belief_scale: float = 0.05
    """At this distance of the makers' price, the odds for its side are e to 1."""
    lean: float = 0.3
    """How far the makers' price is from there when there are orders at one of the best prices only."""
    fade: float = 4.0
    """Cancellations of each order at a best price, besides, for every basis point that the makers' price is beyond."""

    def cancelled(self, side: Side, wrong: float) -> float:
        """Cancellations per second at a side's best price, which is so many basis points on the wrong side."""
        orders = len(side.queues[side.sign * side.keys[-1]])
        usual = self.touch_cancel * (orders - 1)
        return usual + self.fade * orders * wrong if wrong > 0 else usual


@dataclass(slots=True)
class _Parent:
    buys: bool
    informed: bool
    children: int


class Trade(NamedTuple):
    """What a taker's order did."""

    buys: bool
    fills: list[Fill]


class Exchange:
    """One book and its traders. Time is in seconds from the start.

    Args:
        seed: Everything random follows from it.
        value: What the instrument is worth.
        tick: Between two neighbouring prices, in units of the value.
        unit: Lots of the typical size.
        flow: Who trades how.
        pace: Every rate is this many times higher.
        lag: Seconds after which the value is seen here.
    """

    def __init__(
        self, seed: str, value: Value, tick: float, unit: float, flow: Flow, *, pace: float = 1.0, lag: float = 0.0
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a simulation must repeat itself
        self._value = value
        self._tick = tick
        self._unit = unit
        self._flow = flow
        self._pace = pace
        self._lag = lag
        self.now = 0.0
        self.bids, self.asks = Side(1), Side(-1)
        self._crash_ends = 0.0
        self._takers = Hawkes(flow.takers * pace, [Kernel(n, beta * pace) for n, beta in flow.kernels])
        self._mean_takers = flow.takers * pace / (1 - sum(kernel.offspring for kernel in flow.kernels))
        self._parents: list[_Parent] = []
        self._worth = value.at(0.0) / tick
        self._follows = self._worth  # the makers' price without what they learnt from trades
        self._learnt = 0.0  # ticks
        self._news = value.news
        self._open()

    def crash(self, seconds: float) -> None:
        """For so long makers cancel and hardly come back, nobody looks at the value, and takers only sell."""
        self._crash_ends = self.now + seconds

    def pause(self, until: float) -> None:
        """Nothing is done until then, while the value goes on."""
        self._elapse(until - self.now)
        self.now = until

    def step(self, until: float) -> Trade | None:
        """Goes on to the next thing that happens, or to `until`; a trade, when it was one."""
        flow, bids, asks, pace = self._flow, self.bids, self.asks, self._pace
        crashing = self.now < self._crash_ends
        takers = self._takers.intensity() + pace * _CRASH_TAKERS * crashing
        makers = flow.calm_share + (1 - flow.calm_share) * min(_LIVELIEST, takers / self._mean_takers)
        posting = pace * (_CRASH_POSTING if crashing else 1.0)
        cancelling = pace * makers * (_CRASH_CANCELLING if crashing else 1.0)
        inside = posting * flow.inside if -asks.keys[-1] - bids.keys[-1] > 1 else 0.0
        touch, deep = posting * makers * flow.touch, posting * makers * flow.deep
        wrong = self._wrong_side()
        cancel_bid = cancelling * flow.cancelled(bids, wrong)
        cancel_ask = cancelling * flow.cancelled(asks, -wrong)
        cancel_deep = cancelling * flow.deep_cancel * (len(bids.keys) + len(asks.keys))
        rate = takers + inside + touch + deep + cancel_bid + cancel_ask + cancel_deep
        draw = self._random.random
        wait = -math.log(1.0 - draw()) / rate
        longest = min(_LONGEST_STEP, until - self.now)
        if wait >= longest:
            self._elapse(longest)
            self.now = until if longest < _LONGEST_STEP else self.now
            return None
        self._elapse(wait)
        u = draw() * rate
        if (u := u - inside) < 0:
            self._quote_inside()
        elif (u := u - touch) < 0:
            self._quote_touch()
        elif (u := u - deep) < 0:
            self._quote_deep()
        elif (u := u - cancel_bid) < 0:
            self._cancel(bids, len(bids.keys) - 1)
        elif (u := u - cancel_ask) < 0:
            self._cancel(asks, len(asks.keys) - 1)
        elif (u := u - cancel_deep) < 0:
            side = bids if draw() * (len(bids.keys) + len(asks.keys)) < len(bids.keys) else asks
            self._cancel(side, int(draw() * (len(side.keys) - 1)))
        elif crashing and u < pace * _CRASH_TAKERS:
            return self._take(False, flow.taker_sizes.draw(self._random), None)
        elif u - pace * _CRASH_TAKERS * crashing < self._takers.intensity():
            # Thinning: the intensity has fallen since it was asked for.
            return self._taker()
        return None

    def _elapse(self, seconds: float) -> None:
        flow = self._flow
        self.now += seconds
        self._takers.elapse(seconds)
        worth = self._value.at(max(0.0, self.now - self._lag)) / self._tick
        if self._value.news > self._news:
            self._takers.excite((self._value.news - self._news) * flow.news_takers)
            self._news = self._value.news
        heard = (worth - self._follows) * (1 - math.exp(-seconds / flow.belief_lag))
        learnt = self._learnt * math.exp(-seconds / flow.impact_decay)
        if heard * learnt > 0:  # news that trades had told already
            learnt -= math.copysign(min(abs(heard), abs(learnt)), heard)
        self._follows += heard
        self._learnt = learnt
        self._worth = worth

    def _bp(self) -> float:
        """Ticks of a basis point."""
        return self._worth * 1e-4

    def _wrong_side(self) -> float:
        """By how many basis points the mid is above the makers' price.

        That is what they heard of the value, what trades taught them, and the best sizes. This is asked for at every
        step, so it calls nothing.
        """
        bids, asks = self.bids, self.asks
        bid, ask = bids.keys[-1], -asks.keys[-1]
        bid_lots, ask_lots = bids.sizes[bid], asks.sizes[ask]
        bp = self._worth * 1e-4
        lean = self._flow.lean * bp * ((bid_lots - ask_lots) / (bid_lots + ask_lots))
        return ((bid + ask) / 2 - (self._follows + self._learnt + lean)) / bp

    def _imbalance(self) -> float:
        """(bid − ask) / (bid + ask) of the sizes at the best prices."""
        bid, ask = self.bids.sizes[self.bids.keys[-1]], self.asks.sizes[-self.asks.keys[-1]]
        return (bid - ask) / (bid + ask)

    def _taker(self) -> Trade | None:
        self._takers.arrive()
        flow, draw = self._flow, self._random.random
        mid = (self.bids.keys[-1] - self.asks.keys[-1]) / 2
        gap = (self._worth - mid) / self._bp()
        if not self._parents or draw() < flow.new_parent:
            self._parents.append(self._new_parent(gap))
            del self._parents[: -flow.parents]
        elif draw() >= flow.newest:
            self._parents.append(self._parents.pop(int(draw() * len(self._parents))))
        parent = self._parents[-1]
        parent.children -= 1
        if parent.children <= 0:
            self._parents.pop()
        if parent.informed and (abs(gap) < flow.informed_margin or (gap > 0) != parent.buys):
            return None
        size = flow.taker_sizes.draw(self._random)
        if not parent.informed:
            imbalance = self._imbalance() if parent.buys else -self._imbalance()
            patient = draw() < -imbalance * flow.patience
            return None if patient else self._take(parent.buys, size, None)
        return self._take(parent.buys, max(size, flow.informed_size * draw()), round(self._worth))

    def _take(self, buys: bool, size: float, limit: int | None) -> Trade | None:
        side = self.asks if buys else self.bids
        before = (self.bids.keys[-1] - self.asks.keys[-1]) / 2
        fills = side.take(max(1, round(size * self._unit)), limit, LEVELS // 2)
        if not fills:
            return None
        after = (self.bids.keys[-1] - self.asks.keys[-1]) / 2
        self._learnt += self._flow.impact * (after - before)
        self._restock()
        return Trade(buys, fills)

    def _new_parent(self, gap: float) -> _Parent:
        flow, draw = self._flow, self._random.random
        tempted = 1 - math.exp(-abs(gap) / flow.informed_scale)
        informed = draw() < flow.informed + (1 - flow.informed) * tempted
        children = min(flow.most_children, int((1 - draw()) ** (-1 / flow.children)))
        return _Parent(gap > 0 if informed else draw() < flow.buyers, informed, children)

    def _believes_up(self) -> bool:
        """Whether the next maker believes the price to be above the mid."""
        distance = self._wrong_side() / self._flow.belief_scale
        return self._random.random() < 1 / (1 + math.exp(max(-30.0, min(30.0, distance))))

    def _quote_inside(self) -> None:
        bid, ask = self.bids.best(), self.asks.best()
        draw = self._random.random
        rises = self._believes_up()
        room = ask - bid - 1
        step = room if draw() < self._flow.fill else max(1, min(room, math.ceil(room * draw())))
        if rises:
            self._add(self.bids, bid + step, self._flow.touch_sizes)
        else:
            self._add(self.asks, ask - step, self._flow.touch_sizes)

    def _quote_touch(self) -> None:
        side = self.bids if self._believes_up() else self.asks
        self._add(side, side.best(), self._flow.touch_sizes)

    def _quote_deep(self) -> None:
        draw = self._random.random
        side = self.bids if draw() < 0.5 else self.asks
        distance = self._flow.deep_distance * ((1 - draw()) ** (-1 / 1.5) - 1) * self._bp()
        price = side.best() - side.sign * (1 + int(distance))
        if price > 0:
            self._add(side, price, self._flow.deep_sizes)

    def _add(self, side: Side, price: int, sizes: Sizes) -> None:
        side.add(price, self._lots(sizes))
        if len(side.keys) > MOST_LEVELS:
            side.drop_worst()

    def _cancel(self, side: Side, level: int) -> None:
        side.cancel(level, self._random.random())
        self._restock()

    def _lots(self, sizes: Sizes) -> int:
        return max(1, round(self._unit * sizes.draw(self._random)))

    def _restock(self) -> None:
        for side in (self.bids, self.asks):
            while len(side.keys) < LEVELS:
                away = 1 + int(self._random.random() * 0.4 * self._bp())
                worst = side.sign * side.keys[0]
                side.add(worst - side.sign * away, self._lots(self._flow.deep_sizes))

    def _open(self) -> None:
        middle = round(self._worth)
        self.bids.add(middle, self._lots(self._flow.touch_sizes))
        self.asks.add(middle + 1, self._lots(self._flow.touch_sizes))
        self._restock()
