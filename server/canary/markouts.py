"""What the market made of decided rows: the mid a few seconds later, from the server's own features.

The label is the model's own: the side-signed markout of the mid over the next 5 s, *eligible* when it is not worse than
-1 bp. `server/audit/reading/labels.py` computes the same from recorded events on the exchange's clock. The label here
is available while a canary is on trial, and is about as exact as the features are fresh.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from pretrade.decision.v1 import decision_pb2 as pb
from server.models.markout import HORIZON_SECONDS, WORST_MARKOUT_BPS

if TYPE_CHECKING:
    from feature_cache.store.l1 import FeatureCache
    from server.inference.shadow import Pair

_MOST_WAITING = 65_536
_OLDEST_SECONDS = 1.0
"""Features that are older at the end of the horizon say nothing."""


class Markouts:
    """Pairs that wait for the end of their horizon.

    Args:
        feature_cache: Where the mids are.
        clock: Monotonic seconds.
    """

    def __init__(self, feature_cache: FeatureCache, clock: Callable[[], float]) -> None:
        self._feature_cache = feature_cache
        self._listeners: list[Callable[[Pair, bool], None]] = []
        self._clock = clock
        self._waiting: deque[tuple[float, Pair]] = deque(maxlen=_MOST_WAITING)
        self.unknown = 0
        """Pairs whose outcome could not be known."""

    def on_outcome(self, listener: Callable[[Pair, bool], None]) -> None:
        """Registers a function that is called for every pair whose outcome is known, with True when it was eligible."""
        self._listeners.append(listener)

    def add(self, pair: Pair) -> None:
        """A pair that was decided just now; the oldest is forgotten when too many wait."""
        if 0 < pair.mid < math.inf:  # False for NaN
            self._waiting.append((self._clock() + HORIZON_SECONDS, pair))

    def settle(self) -> None:
        """Looks at the market for the pairs whose time has come."""
        now = self._clock()
        while self._waiting and self._waiting[0][0] <= now:
            _, pair = self._waiting.popleft()
            entry = self._feature_cache.get(pair.instrument)
            mid = entry.snapshot.mid if entry is not None and entry.age_seconds(now) <= _OLDEST_SECONDS else math.nan
            if not 0 < mid < math.inf:
                self.unknown += 1
                continue
            markout_bps = 1e4 * (mid / pair.mid - 1) * (1 if pair.side == pb.SIDE_BUY else -1)
            for listener in self._listeners:
                listener(pair, markout_bps >= WORST_MARKOUT_BPS)
