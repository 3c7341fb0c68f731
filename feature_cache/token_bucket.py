"""Token buckets: one alone, and one for each of a bounded number of names."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

_ROUNDING_SECONDS: Final = 1e-9


class TokenBucket:
    """Lets a rate per second pass on average, and at once what some seconds add up to, but at least 1.

    The bucket is stored as the instant at which it will be full again, so that the rate may change at any time.

    Args:
        burst_seconds: What it holds, in seconds of its rate.
    """

    __slots__ = ("_burst_seconds", "_full_at")

    def __init__(self, burst_seconds: float) -> None:
        self._burst_seconds = burst_seconds
        self._full_at = -math.inf

    def take(self, now: float, per_second: float) -> bool:
        """Takes one; False, and nothing taken, when there is none."""
        full_at = self._after_one(now, per_second)
        if full_at is None:
            return False
        self._full_at = full_at
        return True

    def take_some(self, most: int, now: float, per_second: float) -> int:
        """Takes as many as there are, up to so many; how many."""
        taken = 0
        while taken < most and self.take(now, per_second):
            taken += 1
        return taken

    def has(self, now: float, per_second: float) -> bool:
        """True when one could be taken."""
        return self._after_one(now, per_second) is not None

    def is_full(self, now: float) -> bool:
        """True when it is as good as a new one."""
        return self._full_at <= now

    def _after_one(self, now: float, per_second: float) -> float | None:
        """When it will be full again after one is taken; None when there is none."""
        gap = 1 / per_second
        full_at = max(now, self._full_at) + gap
        return full_at if full_at - now <= max(self._burst_seconds, gap) + _ROUNDING_SECONDS else None


class TokenBuckets:
    """A token bucket for each name.

    Args:
        per_second: The default of what a bucket gains a second.
        burst_seconds: What a bucket holds, in seconds of its rate.
        clock: Monotonic seconds.
        most_names: Names that are remembered. Beyond, the one that has taken nothing for longest is forgotten, and
            starts with a full bucket. None: only a name whose bucket is full is forgotten.
    """

    def __init__(
        self, per_second: float, burst_seconds: float, clock: Callable[[], float], most_names: int | None = 10_000
    ) -> None:
        self.per_second = per_second
        self._burst_seconds = burst_seconds
        self._clock = clock
        self._most_names = math.inf if most_names is None else most_names
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        """The longest unused first."""

    def __len__(self) -> int:
        """Names that are remembered."""
        return len(self._buckets)

    def take(self, name: str, per_second: float | None = None) -> bool:
        """Takes one from a name's bucket; False, and nothing taken, when there is none."""
        return self.take_some(1, name, per_second) == 1

    def take_some(self, most: int, name: str, per_second: float | None = None) -> int:
        """Takes as many from a name's bucket as there are, up to so many; how many."""
        now = self._clock()
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._new(name, now)
        taken = bucket.take_some(most, now, per_second or self.per_second)
        if taken:
            self._buckets.move_to_end(name)
        return taken

    def has(self, name: str, per_second: float | None = None) -> bool:
        """True when one could be taken from a name's bucket."""
        bucket = self._buckets.get(name)
        return bucket is None or bucket.has(self._clock(), per_second or self.per_second)

    def _new(self, name: str, now: float) -> TokenBucket:
        """Remembers a name, and forgets the longest unused ones: those with full buckets, and one too many."""
        buckets = self._buckets
        while buckets and (len(buckets) >= self._most_names or next(iter(buckets.values())).is_full(now)):
            buckets.popitem(last=False)
        bucket = buckets[name] = TokenBucket(self._burst_seconds)
        return bucket
