"""Counts of observations by bucket: what the hot paths add to, and what a scrape reads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Final

LATENCY_EDGES_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.010, 0.025, 0.050, 0.100, 0.250, 1.0)
"""Bucket edges; the budgets people ask about are edges, so that a share within a budget is exact."""
ROW_EDGES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)
"""Bucket edges of batch sizes."""


class Histogram:
    """Counts of observed values by bucket, and their sum.

    Args:
        edges: Upper edges, ascending; a value at an edge counts below it.
    """

    __slots__ = ("_counts", "_edges", "_sum")

    def __init__(self, edges: tuple[float, ...] = LATENCY_EDGES_SECONDS) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Adds an observation that was made so many times."""
        self._counts[bisect_left(self._edges, value)] += times
        self._sum += value * times

    def observe_all(self, values: Iterable[float]) -> None:
        """Adds many observations."""
        counts, edges, total = self._counts, self._edges, 0.0
        for value in values:
            counts[bisect_left(edges, value)] += 1
            total += value
        self._sum += total

    def add(self, counts: list[int], total: float) -> None:
        """Adds what was counted elsewhere, in buckets of the same edges, and the sum of it."""
        self._counts = list(map(int.__add__, self._counts, counts))
        self._sum += total

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative (upper edge, count) pairs and the sum, as Prometheus wants them."""
        total, pairs = 0, []
        for edge, count in zip((*map(str, self._edges), "+Inf"), self._counts, strict=True):
            total += count
            pairs.append((edge, float(total)))
        return pairs, self._sum
