"""When a batch leaves for a replica, and how many rows it may have: learnt from how callers and replica answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from server.timing.latency import LatencyWindow

HOLD_SECONDS: Final = 0.004
"""The longest that a row waits for others while the replica is free."""
_MOST_AWAITED: Final = 32
"""A batch of so many rows is worth its call; no more are waited for."""
_LARGEST_SHARE: Final = 0.5
"""Of the orders under way. The other half is elsewhere in the server, or with its callers."""
_SMALLEST_SHARE: Final = 2**-10


class Departure:
    """Whether the rows that wait for a free replica leave, or wait for others that are about to come.

    A call costs a model server as much as the scoring of several hundred rows. While many orders are under way, rows
    therefore wait until half as many are here, or 32; a row waits 4 ms at most. An order that is alone in the server
    waits for nothing, since half of one is less than a row.

    Not every order under way asks this replica: a canary gets its share of them, a secondary only what the primary did
    not answer. The share that is waited for is therefore learnt. It is halved whenever rows have waited in vain, and
    doubled when twice as many have come as were waited for.

    Args:
        under_way: Orders that this server is deciding now.
    """

    def __init__(self, under_way: Callable[[], int]) -> None:
        self._under_way = under_way
        self._share = _LARGEST_SHARE

    @property
    def awaited(self) -> float:
        """Rows that are enough for a batch at this moment."""
        return min(_MOST_AWAITED, self._share * self._under_way())

    def left(self, rows: int) -> None:
        """Learns from a batch of so many rows that leaves."""
        if self._share < _LARGEST_SHARE and rows >= 2 * self.awaited:
            self._share *= 2

    def waited_in_vain(self) -> None:
        """Learns that too few rows came in all the time that they were waited for."""
        self._share = max(self._share / 2, _SMALLEST_SHARE)


class Patience:
    """How long a batch is waited for before it is given up: four times the recent p95, within bounds.

    A replica that answers a batch after it was given up is slow, and not lost. To give up the next ones as early would
    cost the rows their scores and save nothing: the replica works on them all the same. For a second from then on,
    batches are waited for twice as long as that one took, as long as a caller can still use a score. A replica that
    does not answer at all is given up as early as ever.

    Args:
        least, most: Bounds, in seconds.
        latency: Recent time of a batch.
    """

    _MEMORY_SECONDS: Final = 1.0

    def __init__(self, least: float, most: float, latency: LatencyWindow) -> None:
        self._least = least
        self._most = most
        self._latency = latency
        self._late_seconds = 0.0
        self._late_at = -math.inf

    def came_late(self, seconds: float, now: float) -> None:
        """Learns that a batch that was given up has its answer, after so many seconds."""
        self._late_seconds, self._late_at = seconds, now

    def seconds(self, now: float, last_deadline: float) -> float:
        """How long a batch is waited for that leaves now, after whose last deadline nobody can use its scores."""
        patience = min(self._most, max(self._least, 4 * self._latency.p95))
        if now - self._late_at < self._MEMORY_SECONDS:
            patience = max(patience, min(2 * self._late_seconds, last_deadline - now))
        return patience


class RowLimit:
    """How many rows a batch may have so that it is back within a wanted time.

    A batch of n rows takes about a·n + b. Both are fitted to recent batches by least squares that forget; while the
    batches do not tell them apart (all of a size, or no slower with more rows) a batch may have all the rows there may
    be. Where b alone takes most of the wanted time, fewer rows would not mend it: the rows may take half of it in any
    case. And a machine that is busy elsewhere makes batches both late and full, so the limit stops at a few dozen.

    Args:
        most: Rows of the largest batch there may be.
        wanted_seconds: Time of the largest batch.
    """

    _MEMORY: Final = 0.99
    """Weight of a batch next to the one after it."""
    _LEAST: Final = 32

    def __init__(self, most: int, wanted_seconds: float) -> None:
        self.limit = most
        """Rows a batch may have now."""
        self._most = most
        self._wanted_seconds = wanted_seconds
        self._weight = self._rows = self._seconds = self._rows_2 = self._rows_seconds = 0.0

    def landed(self, rows: int, seconds: float) -> None:
        """Counts a batch that came back."""
        keep = self._MEMORY
        self._weight = keep * self._weight + 1
        self._rows = keep * self._rows + rows
        self._seconds = keep * self._seconds + seconds
        self._rows_2 = keep * self._rows_2 + rows * rows
        self._rows_seconds = keep * self._rows_seconds + rows * seconds
        self.limit = self._fitting()

    def _fitting(self) -> int:
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_2 / self._weight - mean_rows**2
        if variance < 1.0:
            return self._most
        per_row = (self._rows_seconds / self._weight - mean_rows * mean_seconds) / variance
        for_rows = max(self._wanted_seconds - (mean_seconds - per_row * mean_rows), self._wanted_seconds / 2)
        if per_row * self._most <= for_rows:
            return self._most
        return min(self._most, max(self._LEAST, math.floor(for_rows / per_row)))
