"""Token buckets, one for each of a bounded number of names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

_MAX_NAMES: Final = 10_000
"""Names that are remembered; the one not seen for longest is forgotten, and begins anew with a full bucket."""


class Rates:
    """How much each name may take: `burst` at once, and `per_second` on average.

    A bucket is kept as the instant at which it will be full again.

    Args:
        per_second: What a bucket gains.
        burst: What it holds.
        clock: Monotonic seconds.
    """

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float]) -> None:
        self.per_second = per_second
        self._seconds = 1 / per_second
        self._depth = max(burst, 1.0) / per_second
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, name: str) -> bool:
        """Takes one; False, and nothing taken, when there is none."""
        now = self._clock()
        full_at = max(now, self._full_at.get(name, now)) + self._seconds
        if full_at - now > self._depth + 1e-9:
            return False
        self._full_at[name] = full_at
        self._full_at.move_to_end(name)
        if len(self._full_at) > _MAX_NAMES:
            self._full_at.popitem(last=False)
        return True

    def has(self, name: str) -> bool:
        """True when one could be taken."""
        now = self._clock()
        return self._full_at.get(name, now) + self._seconds - now <= self._depth + 1e-9
