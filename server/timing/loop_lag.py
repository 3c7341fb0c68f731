"""How far the event loop is behind: time that the loop itself lost must not count against a replica."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from server.timing.histogram import Histogram
from server.timing.latency import LatencyWindow

_TICK_SECONDS: Final = 0.02
_STALL_SECONDS: Final = 0.02
"""Shorter delays are the ordinary work of a busy loop."""
_KEPT: Final = 64


class LoopLag:
    """Measures by how much a timer of this event loop is late, and remembers recent stalls.

    A stall is a delay of more than 20 ms: a long callback, a collection of garbage, or a machine that gave the process
    no time.

    Args:
        clock: Monotonic seconds, the event loop's own.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.delays = Histogram()
        """Every delay since start, in seconds."""
        self._due = float("inf")
        self._stalls: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        self._recent = LatencyWindow(clock, prior_seconds=0.0)
        self.p95 = 0.0
        """What 19 of 20 delays of the last two seconds did not exceed, in seconds."""
        self.p99 = 0.0
        """The same of 99 of 100 delays."""
        self.stalls = 0
        """Stalls since start."""

    async def run(self) -> None:
        """Measures until cancelled."""
        try:
            while True:
                self._due = self._clock() + _TICK_SECONDS
                await asyncio.sleep(_TICK_SECONDS)
                late = max(0.0, self._clock() - self._due)
                self.delays.observe(late)
                self._recent.add(late)
                self.p95, self.p99 = self._recent.p95, self._recent.p99
                if late > _STALL_SECONDS:
                    self.stalls += 1
                    self._stalls.append((self._clock(), late))
        finally:
            self._due = float("inf")

    def stalled_seconds(self, since: float) -> float:
        """How long the loop stood still from the instant `since` until now, a stall just ending included."""
        now = self._clock()
        running = now - self._due
        stalled = running if running > _STALL_SECONDS else 0.0
        for ended, seconds in reversed(self._stalls):
            if ended <= since:
                break
            stalled += seconds
        return min(stalled, now - since)
