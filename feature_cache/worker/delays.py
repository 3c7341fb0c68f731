"""How long events take to the worker and to Redis, for the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

EDGES_SECONDS: Final = (
    *(milliseconds / 1e3 for milliseconds in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 50, 75)),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
"""Upper edges of the buckets."""
_EDGES_NS: Final = np.array([round(1e9 * edge) for edge in EDGES_SECONDS], dtype=np.int64)
_MOST: Final = 100_000
"""Events that wait for a write at most; of an outage of Redis, further ones are not counted as written."""


class DelayHistogram:
    """Counts of delays by bucket."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(len(EDGES_SECONDS) + 1, dtype=np.int64)
        """By bucket of `EDGES_SECONDS`; the last has no upper edge."""
        self.sum_seconds = 0.0

    def observe(self, delays_ns: NDArray[np.int64]) -> None:
        """Counts delays."""
        self.counts += np.bincount(np.searchsorted(_EDGES_NS, delays_ns), minlength=len(self.counts))
        self.sum_seconds += float(delays_ns.sum()) / 1e9


class Delays:
    """Two delays of each event since it was published: until it was read, and until Redis had it in a vector.

    Events of a partition that is still read again are left out: they are history.

    Args:
        wall_ns: Nanoseconds since the Unix epoch. It should agree with the publishers' clocks.
    """

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self._wall_ns = wall_ns
        self._unread: list[int] = []
        self._unwritten: list[int] = []
        self.read = DelayHistogram()
        """Until the worker had computed the event in."""
        self.written = DelayHistogram()
        """Until Redis had stored and published a vector that includes it."""

    def add(self, publish_time_ns: int) -> None:
        """Adds an event that is being read."""
        self._unread.append(publish_time_ns)

    def all_read(self) -> None:
        """All events that were added have been read now."""
        if self._unread:
            self._observe(self.read, self._unread)
            if len(self._unwritten) < _MOST:
                self._unwritten += self._unread
            self._unread = []

    def take_unwritten(self) -> list[int]:
        """The events that a write which begins now includes."""
        self.all_read()
        taken, self._unwritten = self._unwritten, []
        return taken

    def put_back(self, taken: list[int]) -> None:
        """The write has failed."""
        self._unwritten = taken + self._unwritten

    def all_written(self, taken: list[int]) -> None:
        """The write has succeeded."""
        if taken:
            self._observe(self.written, taken)

    def _observe(self, histogram: DelayHistogram, published: list[int]) -> None:
        histogram.observe(np.maximum(0, self._wall_ns() - np.array(published, dtype=np.int64)))
