"""One side of a book of single orders, each level a queue in which the oldest order is filled first."""

from __future__ import annotations

import math
from bisect import insort
from typing import NamedTuple


class Fill(NamedTuple):
    """A resting order that a taker filled, wholly or in part."""

    price: int
    lots: int


class Side:
    """Orders of one side by price, in ticks, and by age.

    Args:
        sign: 1 for bids (the highest price is best), −1 for asks.
    """

    __slots__ = ("changed", "keys", "queues", "sign", "sizes", "updates")

    def __init__(self, sign: int) -> None:
        self.sign = sign
        self.keys: list[int] = []
        """Sign × price of every level, ascending: the best is last. Read-only for others."""
        self.queues: dict[int, list[int]] = {}
        """Lots of each order by price, oldest first. Read-only for others."""
        self.sizes: dict[int, int] = {}
        """Lots of each level by price. Read-only for others."""
        self.changed: dict[int, int] = {}
        """Levels that changed since this was cleared, with their size now; 0 for a level that is gone."""
        self.updates = 0
        """Changes of a level so far."""

    def best(self) -> int:
        """The best price; the side has at least one order."""
        return self.sign * self.keys[-1]

    def add(self, price: int, lots: int) -> None:
        """Puts an order at the end of its level's queue."""
        queue = self.queues.get(price)
        if queue is None:
            self.queues[price] = [lots]
            insort(self.keys, self.sign * price)
            self._set(price, lots)
        else:
            queue.append(lots)
            self._set(price, self.sizes[price] + lots)

    def cancel(self, level: int, draw: float) -> None:
        """Takes one order off a level.

        Args:
            level: Index into `keys`.
            draw: In [0, 1), which of the level's orders.
        """
        price = self.sign * self.keys[level]
        queue = self.queues[price]
        lots = queue.pop(int(draw * len(queue)))
        if queue:
            self._set(price, self.sizes[price] - lots)
        else:
            del self.keys[level], self.queues[price]
            self._set(price, 0)

    def take(self, lots: int, limit: int | None, spared: int) -> list[Fill]:
        """Fills a taker's order from the best price on, the oldest order of each level first.

        Args:
            lots: How much is wanted. What is not filled is dropped.
            limit: The worst price that is accepted; None for any.
            spared: Levels that stay whatever is wanted, so that no side is ever empty.
        """
        fills: list[Fill] = []
        worst = -math.inf if limit is None else self.sign * limit
        while lots and len(self.keys) > spared and self.keys[-1] >= worst:
            price = self.sign * self.keys[-1]
            queue, filled, whole = self.queues[price], 0, 0
            for order in queue:
                part = min(order, lots)
                fills.append(Fill(price, part))
                filled += part
                lots -= part
                if part < order:
                    queue[whole] -= part
                    break
                whole += 1
                if not lots:
                    break
            del queue[:whole]
            if queue:
                self._set(price, self.sizes[price] - filled)
            else:
                del self.keys[-1], self.queues[price]
                self._set(price, 0)
        return fills

    def drop_worst(self) -> None:
        """Takes off the level farthest from the best."""
        price = self.sign * self.keys.pop(0)
        del self.queues[price]
        self._set(price, 0)

    def _set(self, price: int, lots: int) -> None:
        if lots:
            self.sizes[price] = lots
        else:
            del self.sizes[price]
        self.changed[price] = lots
        self.updates += 1
