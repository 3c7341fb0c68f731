"""A seeded market that sends what an exchange would, for use where no recording is available.

Each instrument has a fair value that follows a hidden pressure (mean-reverting, unit variance) and noise of clustered
volatility. The pressure also tilts the sizes at the best levels and the side of the takers, so that the features carry
some information about the next seconds' move, as they do in real markets. How much is set by constants below and was
not fitted to data. The spread reverts to its mean. Behind all this is a book of real levels: quotes follow every change
of the best level, deltas carry all changes every 100 ms, a snapshot is sent at the start and every ten seconds, and
every update id is accounted for.

Instruments are named with the venue `SIM`. The same arguments give the same events.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from feature_cache.engine.book import Levels
from feature_cache.feeds.binance import PRICE_DECIMALS, SIZE_DECIMALS
from pretrade.market.v1 import market_pb2 as pb

VENUE: Final = "SIM"
INSTRUMENTS: Final = ("BTCUSDT.SIM", "ETHUSDT.SIM")
START_NS: Final = 1_700_000_000_000_000_000
"""Where simulated time begins by default."""

_SECOND: Final = 1_000_000_000
_DELTA_NS: Final = 100_000_000
_SNAPSHOT_NS: Final = 10 * _SECOND
_LATENCY_NS: Final = 1_000_000
_JITTER_NS: Final = 200_000

_PRESSURE_SECONDS: Final = 8.0  # how long a pressure lasts
_DRIFT_BPS: Final = 0.4  # fair value's drift per second at pressure 1
_NOISE_BPS: Final = 0.35  # fair value's median noise per square root of a second
_VOLATILITY_SECONDS: Final = 20.0  # how long a calm or a lively spell lasts
_VOLATILITY_SIGMA: Final = 0.6  # standard deviation of the noise's logarithm
_SPREAD_SECONDS: Final = 1.0  # how long a wide or narrow spread lasts
_SPREAD_SIGMA: Final = 0.5  # standard deviation of the spread's logarithm
_SIZE_TILT: Final = 0.7  # pressure's effect on the logarithm of the best sizes
_SIZE_SIGMA: Final = 0.6
_TAKER_TILT: Final = 1.0  # pressure's effect on the log odds that a taker buys
_TRADE_SHARE: Final = 0.2  # of all steps
_DEPTH: Final = 40  # levels kept on each side


@dataclass(frozen=True, slots=True)
class _Market:
    """What an instrument looks like; prices in units of the quote currency, sizes in units of the base."""

    price: float
    tick: float
    spread_ticks: float
    size: float


_MARKETS: Final = {
    "BTCUSDT": _Market(price=60_000.0, tick=0.1, spread_ticks=5.0, size=1.0),
    "ETHUSDT": _Market(price=2_600.0, tick=0.01, spread_ticks=3.0, size=12.0),
}
_OTHER_MARKET: Final = _Market(price=100.0, tick=0.001, spread_ticks=4.0, size=50.0)


def simulate(
    seed: int,
    instruments: Sequence[str] = INSTRUMENTS,
    *,
    events_per_second: float = 150.0,
    start_ns: int = START_NS,
    duration_seconds: float | None = None,
) -> Iterator[pb.MarketEvent]:
    """Simulated events of several instruments, merged by receive time.

    Args:
        seed: Everything random follows from it and the instrument's name.
        instruments: Names of the venue `SIM`; `BTCUSDT` and `ETHUSDT` have prices of their own, others start at 100.
        events_per_second: Mean number of book changes and trades per instrument and second of simulated time.
        start_ns: Event time of the start, nanoseconds since the Unix epoch.
        duration_seconds: Simulated time until the end; None for no end.

    Returns:
        An iterator with `publish_time_ns` equal to the receive time.
    """
    for instrument in instruments:
        if instrument.partition(".")[2] != VENUE:
            raise ValueError(f"{instrument}: a simulated instrument is named SYMBOL.{VENUE}")
    end_ns = None if duration_seconds is None else start_ns + round(duration_seconds * _SECOND)
    return heapq.merge(
        *(_SimulatedInstrument(name, seed, events_per_second, start_ns).events(end_ns) for name in instruments),
        key=attrgetter("receive_time_ns"),
    )


class _SimulatedInstrument:
    def __init__(self, instrument: str, seed: int, events_per_second: float, start_ns: int) -> None:
        symbol = instrument.partition(".")[0]
        market = _MARKETS.get(symbol, _OTHER_MARKET)
        self._instrument = instrument
        self._random = random.Random(f"{seed}:{instrument}")  # noqa: S311 — a simulation must repeat itself
        self._rate = events_per_second
        self._unit = round(market.tick * 10**PRICE_DECIMALS)  # ticks of the event between two neighbouring prices
        self._size = market.size * 10**SIZE_DECIMALS
        self._mean_spread = math.log(market.spread_ticks)
        self._fair = market.price / market.tick  # in neighbouring prices
        self._pressure = self._random.gauss(0, 1)
        self._volatility = 0.0  # deviation of the noise's logarithm from its median
        self._spread = 0.0  # deviation of the spread's logarithm from its mean
        self._now_ns = start_ns
        self._receive_ns = 0
        self._update_id = 1_000
        self._trade_id = 0
        self._sides = {"bid": Levels(1), "ask": Levels(-1)}
        self._changed: dict[str, dict[int, int]] = {"bid": {}, "ask": {}}
        self._delta_from = self._update_id + 1

    def events(self, end_ns: int | None) -> Iterator[pb.MarketEvent]:
        """The events of this instrument in the order in which they are received."""
        self._reprice()
        self._restock()
        yield self._flush_snapshot()
        delta_ns, snapshot_ns = self._now_ns + _DELTA_NS, self._now_ns + _SNAPSHOT_NS
        while True:
            step = self._random.expovariate(self._rate)
            arrival_ns = self._now_ns + round(step * _SECOND)
            while delta_ns <= arrival_ns:
                if end_ns is not None and delta_ns > end_ns:
                    return
                self._now_ns = delta_ns
                if self._delta_from <= self._update_id:
                    yield self._flush_delta()
                if delta_ns >= snapshot_ns:
                    yield self._flush_snapshot()
                    snapshot_ns += _SNAPSHOT_NS
                delta_ns += _DELTA_NS
            if end_ns is not None and arrival_ns > end_ns:
                return
            self._now_ns = arrival_ns
            self._drift(step)
            best = self._best()
            if self._random.random() < _TRADE_SHARE:
                yield self._trade()
            elif self._random.random() < 0.5:
                self._reprice()
            else:
                self._resize_deeper()
            self._restock()
            if self._best() != best:
                yield self._quote()

    def _drift(self, seconds: float) -> None:
        self._pressure = self._revert(self._pressure, seconds / _PRESSURE_SECONDS, 1.0)
        self._spread = self._revert(self._spread, seconds / _SPREAD_SECONDS, _SPREAD_SIGMA)
        self._volatility = self._revert(self._volatility, seconds / _VOLATILITY_SECONDS, _VOLATILITY_SIGMA)
        noise = _NOISE_BPS * math.exp(self._volatility) * math.sqrt(seconds) * self._random.gauss(0, 1)
        self._fair *= 1 + (_DRIFT_BPS * self._pressure * seconds + noise) / 1e4

    def _revert(self, value: float, lifetimes: float, sigma: float) -> float:
        """One step of an Ornstein-Uhlenbeck process with mean 0 and standard deviation `sigma`."""
        decay = math.exp(-lifetimes)
        return value * decay + sigma * math.sqrt(1 - decay * decay) * self._random.gauss(0, 1)

    def _best(self) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        return self._sides["bid"].best(), self._sides["ask"].best()

    def _set(self, side: str, ticks: int, lots: int) -> None:
        self._sides[side].set(ticks, lots)
        self._changed[side][ticks] = lots
        self._update_id += 1

    def _lots(self, tilt: float) -> int:
        return max(1, round(self._size * math.exp(tilt + _SIZE_SIGMA * self._random.gauss(0, 1))))

    def _reprice(self) -> None:
        """Moves the best levels to where fair value and spread want them."""
        spread = max(1, round(math.exp(self._mean_spread + self._spread)))
        bid = max(1, math.floor(self._fair - spread / 2 + 0.5)) * self._unit
        ask = bid + spread * self._unit
        bids, asks = self._sides["bid"], self._sides["ask"]
        # Orders in the way are taken off first, so that the book is never crossed between two updates.
        while (best := asks.best()) and best[0] < ask:
            self._set("ask", best[0], 0)
        while (best := bids.best()) and best[0] > bid:
            self._set("bid", best[0], 0)
        self._set("bid", bid, self._lots(_SIZE_TILT * self._pressure))
        self._set("ask", ask, self._lots(-_SIZE_TILT * self._pressure))

    def _resize_deeper(self) -> None:
        side = "bid" if self._random.random() < 0.5 else "ask"
        best = self._sides[side].best()
        if best is None:
            return
        away = self._random.randint(1, 2 * _DEPTH) * self._unit
        ticks = best[0] - away if side == "bid" else best[0] + away
        if ticks > 0:
            self._set(side, ticks, 0 if self._random.random() < 0.3 else self._lots(0.5))

    def _restock(self) -> None:
        """Keeps the number of levels of each side within bounds."""
        for side, direction in (("bid", -1), ("ask", 1)):
            levels = self._sides[side]
            while len(levels) > 2 * _DEPTH:
                self._set(side, levels.worst() or 0, 0)
            while len(levels) < _DEPTH:
                worst = levels.worst()
                if worst is None:  # a taker took all there was: fair value says where to go on
                    self._reprice()
                    continue
                ticks = worst + direction * self._random.randint(1, 3) * self._unit
                self._set(side, ticks, self._lots(0.5))

    def _trade(self) -> pb.MarketEvent:
        buys = self._random.random() < 1 / (1 + math.exp(-_TAKER_TILT * self._pressure))
        side = "ask" if buys else "bid"
        best = self._sides[side].best()
        assert best is not None, "restocked after every step"
        lots = min(best[1], self._lots(-2.0))
        self._trade_id += 1
        self._set(side, best[0], best[1] - lots)
        event = self._event()
        event.trade.trade_id = self._trade_id
        event.trade.price_ticks = best[0]
        event.trade.lots = lots
        event.trade.taker_side = pb.TAKER_SIDE_BUY if buys else pb.TAKER_SIDE_SELL
        return event

    def _quote(self) -> pb.MarketEvent:
        bid, ask = self._best()
        event = self._event()
        quote = event.quote
        quote.update_id = self._update_id
        if bid:
            quote.bid_ticks, quote.bid_lots = bid
        if ask:
            quote.ask_ticks, quote.ask_lots = ask
        return event

    def _flush_delta(self) -> pb.MarketEvent:
        event = self._event()
        delta = event.delta
        delta.first_update_id = self._delta_from
        delta.last_update_id = self._update_id
        delta.bid_ticks.extend(self._changed["bid"])
        delta.bid_lots.extend(self._changed["bid"].values())
        delta.ask_ticks.extend(self._changed["ask"])
        delta.ask_lots.extend(self._changed["ask"].values())
        self._forget_changes()
        return event

    def _flush_snapshot(self) -> pb.MarketEvent:
        event = self._event()
        snapshot = event.snapshot
        snapshot.last_update_id = self._update_id
        bids, asks = self._sides["bid"].sizes, self._sides["ask"].sizes
        snapshot.bid_ticks.extend(bids)
        snapshot.bid_lots.extend(bids.values())
        snapshot.ask_ticks.extend(asks)
        snapshot.ask_lots.extend(asks.values())
        self._forget_changes()
        return event

    def _forget_changes(self) -> None:
        self._changed["bid"].clear()
        self._changed["ask"].clear()
        self._delta_from = self._update_id + 1

    def _event(self) -> pb.MarketEvent:
        delay = _LATENCY_NS + round(self._random.expovariate(1 / _JITTER_NS))
        self._receive_ns = max(self._receive_ns, self._now_ns + delay)
        return pb.MarketEvent(
            instrument=self._instrument,
            price_decimals=PRICE_DECIMALS,
            size_decimals=SIZE_DECIMALS,
            event_time_ns=self._now_ns,
            receive_time_ns=self._receive_ns,
            publish_time_ns=self._receive_ns,
        )
