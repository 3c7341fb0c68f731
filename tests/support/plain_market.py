"""A market as plain as one can be: one level a side, and trades that walk at random. An hour of it is quickly made."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from typing import Final

from feature_cache.bars.bar import SECOND_NS
from pretrade.market.v1 import market_pb2 as pb

START_NS: Final = 1_700_000_100 * SECOND_NS
"""Begins a bar of every interval."""


class PlainMarket:
    """Events of one instrument, on and on.

    Args:
        instrument: `SYMBOL.VENUE`.
        seed: Of the walk.
        trades: In a second.
        start_ns: Event time of the first event.
    """

    def __init__(self, instrument: str, seed: int = 1, trades: int = 3, start_ns: int = START_NS) -> None:
        self._instrument = instrument
        self._dice = random.Random(seed)
        self._trades = trades
        self._numbers = count(1)
        self._price = 1_000_000
        self.now_ns = start_ns
        """Event time of the next event."""

    def run(self, seconds: int) -> Iterator[pb.MarketEvent]:
        """So many seconds: in each a book, and then trades."""
        for _ in range(seconds):
            yield self._event(snapshot=self._book())
            for _ in range(self._trades):
                self.now_ns += SECOND_NS // (self._trades + 1)
                self._price += self._dice.randint(-300, 300)
                trade = pb.Trade(
                    trade_id=next(self._numbers),
                    price_ticks=self._price,
                    lots=self._dice.randint(1, 10**6),
                    taker_side=self._dice.choice((pb.TAKER_SIDE_BUY, pb.TAKER_SIDE_SELL, pb.TAKER_SIDE_UNSPECIFIED)),
                )
                yield self._event(trade=trade)
            self.now_ns += SECOND_NS - self._trades * (SECOND_NS // (self._trades + 1))

    def reset(self) -> pb.MarketEvent:
        """The feed has lost continuity."""
        return self._event(reset=pb.BookReset(reason="reconnect"))

    def _book(self) -> pb.BookSnapshot:
        half = self._dice.randint(1, 50)
        return pb.BookSnapshot(
            last_update_id=next(self._numbers),
            bid_ticks=[self._price - half],
            bid_lots=[self._dice.randint(1, 10**6)],
            ask_ticks=[self._price + half],
            ask_lots=[self._dice.randint(1, 10**6)],
        )

    def _event(self, **body: pb.BookSnapshot | pb.Trade | pb.BookReset) -> pb.MarketEvent:
        return pb.MarketEvent(
            instrument=self._instrument,
            price_decimals=2,
            size_decimals=3,
            event_time_ns=self.now_ns,
            receive_time_ns=self.now_ns,
            publish_time_ns=self.now_ns,
            **body,  # type: ignore[arg-type]  # one field of the oneof
        )
