"""Rolling windows on event time, updated event by event.

An entry at time t is inside a window of width w at time T when T − w < t <= T. Times are nanoseconds and never run
backwards. Sums are integers (ticks, lots), so that an entry that leaves a window subtracts exactly what it had added.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import islice
from typing import Final

GRID_NS: Final = 100_000_000
"""Step of the grid of `RealisedVariance`, which stands at whole multiples of it since the Unix epoch."""


class FlowWindow:
    """Order-flow imbalance over one window: Σ e_n over the mean best-level depth of the same events."""

    __slots__ = ("_depth", "_entries", "_flow", "_width_ns")

    def __init__(self, width_ns: int) -> None:
        self._width_ns = width_ns
        self._entries: deque[tuple[int, int, int]] = deque()
        self._flow = 0
        self._depth = 0

    def add(self, entry: tuple[int, int, int]) -> None:
        """Takes (time, e_n, qb_n + qa_n) in; the newest entry so far."""
        self._evict(entry[0])
        self._entries.append(entry)
        self._flow += entry[1]
        self._depth += entry[2]

    def _evict(self, now_ns: int) -> None:
        entries = self._entries
        start = now_ns - self._width_ns
        while entries and entries[0][0] <= start:
            _, flow, depth = entries.popleft()
            self._flow -= flow
            self._depth -= depth

    def value(self, now_ns: int) -> float:
        """The imbalance at `now_ns`; 0 without an event, NaN when no event had any depth."""
        self._evict(now_ns)
        if not self._entries:
            return 0.0
        if not self._depth:
            return math.nan
        return self._flow * 2 * len(self._entries) / self._depth


class TradeWindow:
    """Trade imbalance and rate over one window."""

    __slots__ = ("_buys", "_entries", "_sells", "_width_ns")

    def __init__(self, width_ns: int) -> None:
        self._width_ns = width_ns
        self._entries: deque[tuple[int, int, int]] = deque()
        self._buys = 0
        self._sells = 0

    def add(self, entry: tuple[int, int, int]) -> None:
        """Takes (time, lots bought, lots sold) by the taker in; the newest entry so far."""
        self._evict(entry[0])
        self._entries.append(entry)
        self._buys += entry[1]
        self._sells += entry[2]

    def _evict(self, now_ns: int) -> None:
        entries = self._entries
        start = now_ns - self._width_ns
        while entries and entries[0][0] <= start:
            _, bought, sold = entries.popleft()
            self._buys -= bought
            self._sells -= sold

    def imbalance(self, now_ns: int) -> float:
        """(buys − sells) / (buys + sells) in lots at `now_ns`; 0 without a trade of a known side."""
        self._evict(now_ns)
        total = self._buys + self._sells
        return (self._buys - self._sells) / total if total else 0.0

    def rate(self, now_ns: int) -> float:
        """Trades per second at `now_ns`."""
        self._evict(now_ns)
        return len(self._entries) * 1e9 / self._width_ns


class LookBack:
    """The mid as it was one width ago: the last one at or before T − w."""

    __slots__ = ("_entries", "_mid", "_width_ns")

    def __init__(self, width_ns: int) -> None:
        self._width_ns = width_ns
        self._entries: deque[tuple[int, int]] = deque()
        self._mid: int | None = None

    def add(self, entry: tuple[int, int]) -> None:
        """Takes (time, mid) in; the newest entry so far."""
        self.mid(entry[0])
        self._entries.append(entry)

    def mid(self, now_ns: int) -> int | None:
        """The mid one width before `now_ns`; None until the history reaches back that far."""
        entries = self._entries
        start = now_ns - self._width_ns
        while entries and entries[0][0] <= start:
            self._mid = entries.popleft()[1]
        return self._mid


class RealisedVariance:
    """Σ r² over whole windows, r being the log mid returns on a fixed grid by previous tick.

    The mid at a grid point is the last one at or before it. A window of width w (a multiple of the grid's step) at time
    T holds the w/step returns that end at grid points in (T − w, T]; it is undefined until each of them has a mid at
    both ends. A grid point is settled once time has passed it: further mids at exactly its time still count.

    Args:
        longest_ns: Width of the longest window asked for.
    """

    __slots__ = ("_capacity", "_mid", "_mid_at_grid", "_next", "_squares")

    def __init__(self, longest_ns: int) -> None:
        self._capacity = longest_ns // GRID_NS
        self._squares: deque[float] = deque(maxlen=self._capacity)
        self._next = 0  # index of the first grid point that is not settled
        self._mid: int | None = None
        self._mid_at_grid: int | None = None  # at the last settled grid point

    def add(self, time_ns: int, mid: int) -> None:
        """Takes the newest mid in."""
        if self._mid is None:
            self._next = -(-time_ns // GRID_NS)
        else:
            self._settle(time_ns)
        self._mid = mid

    def _settle(self, now_ns: int) -> None:
        """Settles the grid points before `now_ns`."""
        if self._mid is None or self._next * GRID_NS >= now_ns:
            return
        end = -(-now_ns // GRID_NS)  # first grid point at or after now
        squares = self._squares
        steps = end - self._next
        if self._mid_at_grid is not None:
            squares.append(_squared_return(self._mid, self._mid_at_grid))
        squares.extend([0.0] * min(steps - 1, self._capacity))
        self._mid_at_grid = self._mid
        self._next = end

    def sum(self, width_ns: int, now_ns: int) -> float:
        """Σ r² over the window that ends at `now_ns`; NaN while undefined."""
        self._settle(now_ns)
        count = width_ns // GRID_NS
        total = 0.0
        if now_ns == self._next * GRID_NS:  # the grid point at this very instant
            if self._mid is None or self._mid_at_grid is None:
                return math.nan
            total = _squared_return(self._mid, self._mid_at_grid)
            count -= 1
        if len(self._squares) < count:
            return math.nan
        return total + sum(islice(reversed(self._squares), count))


class TradeReturns:
    """Mean and standard deviation of the last trade-price log returns."""

    __slots__ = ("_price", "_returns")

    def __init__(self, count: int) -> None:
        self._price = 0
        self._returns: deque[float] = deque(maxlen=count)

    def add(self, price: int) -> None:
        """Takes the newest trade's price in."""
        if self._price:
            self._returns.append(math.log(price / self._price))
        self._price = price

    def moments(self) -> tuple[float, float, int]:
        """(mean, standard deviation with n − 1, n); NaN for a moment that n does not define."""
        n = len(self._returns)
        if not n:
            return math.nan, math.nan, 0
        mean = sum(self._returns) / n
        if n == 1:
            return mean, math.nan, 1
        return mean, math.sqrt(sum((r - mean) ** 2 for r in self._returns) / (n - 1)), n


def _squared_return(mid: int, base: int) -> float:
    return 0.0 if mid == base else math.log(mid / base) ** 2
