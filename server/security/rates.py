"""Token buckets, one for each of a bounded number of names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

_MAX_NAMES: Final = 10_000
"""Names that are remembered. The one not seen for longest is forgotten, and starts again with a full bucket."""


class Rates:
    """How much each name may take: a rate per second on average, and at once what some seconds add, at least 1.

    A bucket is stored as the instant at which it will be full again, so that a name's rate may change at any time.

    Args:
        per_second: The default of what a bucket gains a second.
        burst_seconds: What a bucket holds, in seconds of its rate.
        clock: Monotonic seconds.
    """

    def __init__(self, per_second: float, burst_seconds: float, clock: Callable[[], float]) -> None:
        self.per_second = per_second
        self._burst_seconds = burst_seconds
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, name: str, per_second: float | None = None) -> bool:
        """Takes one; False, and nothing taken, when there is none."""
        now = self._clock()
        full_at = self._after_one(name, now, per_second)
        if full_at is None:
            return False
        self._full_at[name] = full_at
        self._full_at.move_to_end(name)
        if len(self._full_at) > _MAX_NAMES:
            self._full_at.popitem(last=False)
        return True

    def has(self, name: str, per_second: float | None = None) -> bool:
        """True when one could be taken."""
        return self._after_one(name, self._clock(), per_second) is not None

    def _after_one(self, name: str, now: float, per_second: float | None) -> float | None:
        """When the bucket will be full again after one is taken; None when there is none."""
        gap = 1 / (per_second or self.per_second)
        full_at = max(now, self._full_at.get(name, now)) + gap
        return full_at if full_at - now <= max(self._burst_seconds, gap) + 1e-9 else None
