"""A seeded market that sends what an exchange would, for use where no recording is available.

Behind it is an order-level simulation: `simulated/exchange.py` says who trades. Its constants were fitted to a recorded
session; `pretrade market-facts` shows how close the two are. Quotes follow every change of the best level, deltas
carry all changes every 100 ms, a snapshot is sent at the start and every ten seconds, and every update id is accounted
for. A taker's order that fills several makers' orders is as many trades of one event time, as real venues send them.

Instruments are named with the venue `SIM`, or with `SIM2`: a second venue for the same symbols, with traders of its
own, where the value arrives later. The same arguments give the same events.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Final

from feature_cache.feeds.binance import PRICE_DECIMALS, SIZE_DECIMALS
from feature_cache.sources.simulated.exchange import Exchange, Flow, Trade
from feature_cache.sources.simulated.scenarios import EVERY_SECONDS, FIRST_SECONDS, Scenario, ScenarioName, scenario_of
from feature_cache.sources.simulated.value import Value, Volatility
from pretrade.market.v1 import market_pb2 as pb

VENUE: Final = "SIM"
SECOND_VENUE: Final = "SIM2"
INSTRUMENTS: Final = ("BTCUSDT.SIM", "ETHUSDT.SIM")
START_NS: Final = 1_700_000_000_000_000_000
"""Where simulated time begins by default."""
NORMAL_RATE: Final = 220.0
"""About how many events an instrument of the fitted market has per second."""

_SECOND: Final = 1_000_000_000
_DELTA_NS: Final = 100_000_000
_SNAPSHOT_NS: Final = 10 * _SECOND
_LATENCY_NS: Final = 1_000_000
_JITTER_NS: Final = 200_000
_LAGS: Final = {VENUE: 0.0, SECOND_VENUE: 0.2}
"""Seconds after which each venue's traders see the value."""
_NEVER: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class _Market:
    """What an instrument looks like; prices in units of the quote currency, sizes in units of the base."""

    price: float
    tick: float
    size: float
    """The size that the flow's sizes are multiples of."""


_MARKETS: Final = {
    "BTCUSDT": _Market(price=60_000.0, tick=0.01, size=1.0),
    "ETHUSDT": _Market(price=2_600.0, tick=0.01, size=12.0),
}
_OTHER_MARKET: Final = _Market(price=100.0, tick=0.001, size=50.0)


def simulate(
    seed: int,
    instruments: Sequence[str] = INSTRUMENTS,
    *,
    events_per_second: float = NORMAL_RATE,
    start_ns: int = START_NS,
    duration_seconds: float | None = None,
    scenario: str = ScenarioName.NORMAL,
) -> Iterator[pb.MarketEvent]:
    """Simulated events of several instruments, merged by receive time.

    Args:
        seed: Everything random follows from it and the instrument's name; the value of a symbol is the same on both
            venues.
        instruments: Names of the venues `SIM` and `SIM2`; `BTCUSDT` and `ETHUSDT` have prices of their own, others
            start at 100.
        events_per_second: About how many events an instrument has per second of simulated time. Every rate of orders
            follows from it; the value moves as ever.
        start_ns: Event time of the start, nanoseconds since the Unix epoch.
        duration_seconds: Simulated time until the end; None for no end.
        scenario: The name of one in `SCENARIOS`.

    Returns:
        An iterator with `publish_time_ns` equal to the receive time.

    Raises:
        ValueError: There is no such venue, or no such scenario.
    """
    for instrument in instruments:
        if instrument.partition(".")[2] not in _LAGS:
            raise ValueError(f"{instrument}: a simulated instrument is named SYMBOL.{VENUE} or SYMBOL.{SECOND_VENUE}")
    found = scenario_of(scenario)
    end_ns = None if duration_seconds is None else start_ns + round(duration_seconds * _SECOND)
    return heapq.merge(
        *(_SimulatedInstrument(name, seed, events_per_second, start_ns, found).events(end_ns) for name in instruments),
        key=attrgetter("receive_time_ns"),
    )


def on_both_venues(instruments: Sequence[str]) -> list[str]:
    """These instruments, and their symbols on the second venue."""
    return list(dict.fromkeys([*instruments, *(f"{name.partition('.')[0]}.{SECOND_VENUE}" for name in instruments)]))


class _SimulatedInstrument:
    """Runs one instrument's exchange, and tells what its feed would."""

    def __init__(self, instrument: str, seed: int, events_per_second: float, start_ns: int, scenario: Scenario) -> None:
        symbol, _, venue = instrument.partition(".")
        market = _MARKETS.get(symbol, _OTHER_MARKET)
        self._instrument = instrument
        self._scenario = scenario
        self._random = random.Random(f"{seed}:{instrument}:feed")  # noqa: S311 - a simulation must repeat itself
        # What happens to a symbol happens to it on both venues.
        self._news = random.Random(f"{seed}:{symbol}:news")  # noqa: S311 - as above
        self._value = Value(f"{seed}:{symbol}", market.price, Volatility().scaled(scenario.volatility))
        self._exchange = Exchange(
            f"{seed}:{instrument}",
            self._value,
            market.tick,
            market.size * 10**SIZE_DECIMALS,
            replace(Flow(), buyers=scenario.buyers),
            pace=events_per_second / NORMAL_RATE * scenario.pace,
            lag=_LAGS[venue],
        )
        self._lag_ns = round(_LAGS[venue] * _SECOND)
        self._unit = round(market.tick * 10**PRICE_DECIMALS)  # ticks of the event between two neighbouring prices
        self._start_ns = start_ns
        self._now_ns = start_ns
        self._receive_ns = 0
        self._first_update_id = 1_000
        self._trade_id = 0
        self._told = self._update_id
        self._best = self._top()

    def events(self, end_ns: int | None) -> Iterator[pb.MarketEvent]:
        """The events of this instrument in the order in which they are received."""
        end_ns = _NEVER if end_ns is None else end_ns
        yield self._snapshot()
        delta_ns, snapshot_ns = self._start_ns + _DELTA_NS, self._start_ns + _SNAPSHOT_NS
        happens_ns = self._start_ns + round(FIRST_SECONDS * _SECOND) + self._lag_ns
        while delta_ns <= end_ns:
            yield from self._trading(delta_ns)
            if self._told < self._update_id:
                yield self._delta()
            if delta_ns >= happens_ns:
                happens_ns += round(EVERY_SECONDS * _SECOND)
                silence_ns = self._happen()
                if silence_ns:
                    delta_ns += silence_ns
                    if delta_ns > end_ns:
                        return
                    yield from self._come_back(delta_ns)
            if delta_ns >= snapshot_ns:
                yield self._snapshot()
                snapshot_ns += _SNAPSHOT_NS * (1 + (delta_ns - snapshot_ns) // _SNAPSHOT_NS)
            delta_ns += _DELTA_NS
        yield from self._trading(end_ns)

    def _trading(self, until_ns: int) -> Iterator[pb.MarketEvent]:
        """Trades and quotes up to a time."""
        exchange, until = self._exchange, (until_ns - self._start_ns) / _SECOND
        while exchange.now < until:
            trade = exchange.step(until)
            top = self._top()
            if trade is None and top == self._best:
                continue
            self._now_ns = min(until_ns, self._start_ns + round(exchange.now * _SECOND))
            if trade is not None:
                yield from self._trades(trade)
            if top != self._best:
                self._best = top
                yield self._quote()
        self._now_ns = until_ns

    def _happen(self) -> int:
        """What the scenario is about; for how long the venue is silent after it, nanoseconds."""
        scenario = self._scenario
        if scenario.news_bps:
            self._value.shift(scenario.news_bps if self._news.random() < 0.5 else -scenario.news_bps)
        if scenario.crash_seconds:
            self._exchange.crash(scenario.crash_seconds)
        return round(scenario.outage_seconds * _SECOND)

    def _come_back(self, now_ns: int) -> Iterator[pb.MarketEvent]:
        self._exchange.pause((now_ns - self._start_ns) / _SECOND)
        self._now_ns = now_ns
        event = self._event()
        event.reset.reason = "outage"
        yield event
        yield self._snapshot()

    @property
    def _update_id(self) -> int:
        return self._first_update_id + self._exchange.bids.updates + self._exchange.asks.updates

    def _top(self) -> tuple[int, int, int, int]:
        bids, asks = self._exchange.bids, self._exchange.asks
        bid, ask = bids.keys[-1], -asks.keys[-1]
        return bid, bids.sizes[bid], ask, asks.sizes[ask]

    def _trades(self, trade: Trade) -> Iterator[pb.MarketEvent]:
        for fill in trade.fills:
            self._trade_id += 1
            event = self._event()
            event.trade.trade_id = self._trade_id
            event.trade.price_ticks = fill.price * self._unit
            event.trade.lots = fill.lots
            event.trade.taker_side = pb.TAKER_SIDE_BUY if trade.buys else pb.TAKER_SIDE_SELL
            yield event

    def _quote(self) -> pb.MarketEvent:
        event = self._event()
        quote = event.quote
        quote.update_id = self._update_id
        bid, quote.bid_lots, ask, quote.ask_lots = self._best
        quote.bid_ticks, quote.ask_ticks = bid * self._unit, ask * self._unit
        return event

    def _delta(self) -> pb.MarketEvent:
        event = self._event()
        delta = event.delta
        delta.first_update_id = self._told + 1
        delta.last_update_id = self._update_id
        unit = self._unit
        bids, asks = self._exchange.bids.changed, self._exchange.asks.changed
        delta.bid_ticks.extend([price * unit for price in bids])
        delta.bid_lots.extend(bids.values())
        delta.ask_ticks.extend([price * unit for price in asks])
        delta.ask_lots.extend(asks.values())
        self._forget_changes()
        return event

    def _snapshot(self) -> pb.MarketEvent:
        event = self._event()
        snapshot = event.snapshot
        snapshot.last_update_id = self._update_id
        unit = self._unit
        bids, asks = self._exchange.bids.sizes, self._exchange.asks.sizes
        snapshot.bid_ticks.extend([price * unit for price in bids])
        snapshot.bid_lots.extend(bids.values())
        snapshot.ask_ticks.extend([price * unit for price in asks])
        snapshot.ask_lots.extend(asks.values())
        self._forget_changes()
        return event

    def _forget_changes(self) -> None:
        self._exchange.bids.changed.clear()
        self._exchange.asks.changed.clear()
        self._told = self._update_id

    def _event(self) -> pb.MarketEvent:
        delay = _LATENCY_NS - round(math.log(1.0 - self._random.random()) * _JITTER_NS)
        self._receive_ns = max(self._receive_ns, self._now_ns + delay)
        return pb.MarketEvent(
            instrument=self._instrument,
            price_decimals=PRICE_DECIMALS,
            size_decimals=SIZE_DECIMALS,
            event_time_ns=self._now_ns,
            receive_time_ns=self._receive_ns,
            publish_time_ns=self._receive_ns,
        )
