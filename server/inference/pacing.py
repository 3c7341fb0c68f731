"""How much to send to a replica at once, learnt from how it answers: batches in flight, and rows in a batch."""

from __future__ import annotations

import math
from typing import Final

_EPOCH_SECONDS: Final = 0.5
_MIN_BATCHES: Final = 20
"""Fewer in an epoch say nothing about what the replica could do."""
_SATURATED_SHARE: Final = 0.8
"""Of an epoch's batches that left others waiting when they came back: then the slots are what holds the rows up."""
_PAIRS: Final = 4
"""Epochs with the best number and with another one, in turn, before the two are compared."""
_REST_SECONDS: Final = 10.0
"""Between two comparisons."""
_GAIN: Final = 1.05
"""The gain that justifies one more slot. One slot less wins unless it costs that much, because fuller batches are
cheaper."""


class SlotSearch:
    """How many batches may be in flight to one replica: as many as make it score more rows a second.

    A replica with cores of its own takes the next batch while one is under way; one that shares them takes twice as
    long for two. Which it is shows only while rows wait for a slot. Then another number is tried in turn with the best
    one so far, half a second each, and the two are compared; without rows waiting it stays at the number to start with,
    which a lone row profits from.

    Args:
        start: Slots to start with.
        most: Never more; `start` for a fixed number.
        now: Monotonic seconds.
    """

    def __init__(self, start: int, most: int, now: float) -> None:
        self.limit = start
        """Batches that may be in flight now."""
        self._start = start
        self._most = max(start, most)
        self._fixed = most <= start
        self._best = start
        self._step = 1
        self._rates: list[float] = []
        """Rows a second of the comparison under way: the best number's, then the other one's, and so on."""
        self._rest_until = now
        self._begin(now)

    def landed(self, rows: int, others_wait: bool, now: float) -> None:
        """Counts a batch that came back.

        Args:
            rows: Its rows.
            others_wait: True when rows wait for its slot.
            now: Monotonic seconds.
        """
        if self._fixed:
            return
        self._rows += rows
        self._batches += 1
        self._waited += others_wait
        if now - self._began >= _EPOCH_SECONDS:
            self._end_epoch(now)

    def _begin(self, now: float) -> None:
        self._began = now
        self._rows = self._batches = self._waited = 0

    def _end_epoch(self, now: float) -> None:
        rate = self._rows / (now - self._began)
        saturated = self._batches >= _MIN_BATCHES and self._waited >= _SATURATED_SHARE * self._batches
        self._begin(now)
        if not saturated:
            self._rates.clear()
            self.limit = self._start
        elif now < self._rest_until:
            self.limit = self._best
        else:
            self._compare(rate, now)

    def _compare(self, rate: float, now: float) -> None:
        """Takes the rate of the number that was in force, and puts the other one in force."""
        other = self._candidate()
        if not self._rates and self.limit != self._best:
            self.limit = self._best  # a comparison begins with the best one
            return
        self._rates.append(rate)
        if len(self._rates) < 2 * _PAIRS:
            self.limit = other if len(self._rates) % 2 else self._best
            return
        was, would_be = sum(self._rates[::2]), sum(self._rates[1::2])
        if would_be >= (was * _GAIN if other > self._best else was / _GAIN):
            self._best = other
        else:
            self._step = -self._step
        self._rates.clear()
        self._rest_until = now + _REST_SECONDS
        self.limit = self._best

    def _candidate(self) -> int:
        """The number to compare the best one with: its neighbour on the side that is looked at."""
        if not 1 <= self._best + self._step <= self._most:
            self._step = -self._step
        return self._best + self._step


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
