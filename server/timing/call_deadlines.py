"""When a caller on grpc.aio stops waiting, independent of the wall clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

_STEP_SECONDS: Final = 0.05
"""Smaller steps are no more than a thread that lost its core between two looks."""
_PENDING_SECONDS: Final = 0.25
"""How long after a step a call may turn up that arrived before it."""


class CallDeadlines:
    """Makes a monotonic instant of what grpc.aio says of a call's remaining time.

    gRPC measures deadlines on the monotonic clock but hands them to its handlers as instants of the wall clock, taken
    when the call arrived. A clock that steps forward before the call is taken up makes such a call look expired. Its
    true deadline is lost, so it gets the server's cap; the transport ends it in time all the same.

    Args:
        clock: Monotonic seconds.
        wall_clock: Seconds of the wall clock that gRPC reads.
    """

    def __init__(self, clock: Callable[[], float], wall_clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._offset = wall_clock() - clock()
        self._stepped = -math.inf

    def deadline(self, remaining: float | None) -> float | None:
        """The monotonic instant at which a call's caller stops waiting.

        Args:
            remaining: What the transport has just said, in seconds: None without a deadline, 0 when it has passed.

        Returns:
            None without a deadline, and where it cannot be known.
        """
        now = self._clock()
        offset = self._wall_clock() - now
        if abs(offset - self._offset) > _STEP_SECONDS:
            self._stepped = now
        self._offset = offset
        if remaining is None or (remaining == 0.0 and now - self._stepped < _PENDING_SECONDS):
            return None
        return now + remaining

    def has_passed(self, deadline: float | None) -> bool:
        """Whether a caller with this deadline, in monotonic seconds, has stopped waiting."""
        return deadline is not None and self._clock() >= deadline
