"""The smallest recent lag of a feed: the difference of the two clocks plus the fastest exchange-to-receipt time."""

from __future__ import annotations

from typing import Final

MAX_OFFSET_NS: Final = 500_000_000
"""How much of a feed's smallest lag may be laid to clocks and distance; more of it means that the feed is late.

A lag does not say whether the local clock is ahead or the feed behind. Hosts that keep time are within milliseconds and
feeds within tens of them, so beyond this bound the safe reading is the right one. A negative lag needs no bound:
nothing arrives before it was sent, so it can only be the clocks.
"""
_BUCKET_NS: Final = 60 * 10**9


class MinimumLag:
    """Rolling minimum of (receive time − exchange event time) over the last one to two minutes of receive time.

    Two buckets of a minute each are kept, so the memory is constant; a jump of the local clock is forgotten within two
    minutes. The lag is negative where the local clock runs behind the exchange's.
    """

    __slots__ = ("_bucket", "_current", "_previous")

    def __init__(self) -> None:
        self._bucket = 0
        self._current: int | None = None
        self._previous: int | None = None

    def observe(self, receive_time_ns: int, event_time_ns: int) -> int:
        """Takes one timed message in.

        Returns:
            The smallest lag in nanoseconds, this message's included.
        """
        self._roll(receive_time_ns)
        lag = receive_time_ns - event_time_ns
        if self._current is None or lag < self._current:
            self._current = lag
        if self._previous is not None and self._previous < self._current:
            return self._previous
        return self._current

    def at(self, receive_time_ns: int) -> int | None:
        """The smallest lag in nanoseconds as known at `receive_time_ns`; None before the first timed message."""
        self._roll(receive_time_ns)
        if self._current is None:
            return self._previous
        return self._current if self._previous is None else min(self._previous, self._current)

    def _roll(self, receive_time_ns: int) -> None:
        bucket = receive_time_ns // _BUCKET_NS
        if bucket != self._bucket:
            self._previous = self._current if bucket == self._bucket + 1 else None
            self._current = None
            self._bucket = bucket
