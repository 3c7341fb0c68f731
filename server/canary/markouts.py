"""What the market made of decided rows: their markout, from the server's own features.

The label is the one that the canary has learnt (`server/models/markout.py`): how long after the decision an order
reaches the market, what it is done at, how long after that the mid is looked at, and which markout is *eligible*.
`server/audit/reading/labels.py` computes the same from recorded events on the exchange's clock. The label here is
available while a canary is on trial, and is about as exact as the features are fresh.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from pretrade.decision.v1 import decision_pb2 as pb
from server.models.markout import Markout

if TYPE_CHECKING:
    from feature_cache.store.codec import FeatureSnapshot
    from feature_cache.store.l1 import FeatureCache
    from server.inference.shadow import Pair

_MOST_WAITING = 65_536
_OLDEST_SECONDS = 1.0
"""Features that are older at a look at the market say nothing."""


class Markouts:
    """Pairs that wait for their order to reach the market, and then for the end of the horizon.

    Args:
        feature_cache: Where the mids are.
        clock: Monotonic seconds.
    """

    def __init__(self, feature_cache: FeatureCache, clock: Callable[[], float]) -> None:
        self._feature_cache = feature_cache
        self._listeners: list[Callable[[Pair, bool], None]] = []
        self._clock = clock
        self.label = Markout()
        """What is looked at."""
        self._reaching: deque[tuple[float, Pair]] = deque(maxlen=_MOST_WAITING)
        """When their order reaches the market, the earliest first."""
        self._waiting: deque[tuple[float, Pair, float]] = deque(maxlen=_MOST_WAITING)
        """When their horizon ends, the earliest first, and what their order was done at."""
        self.unknown = 0
        """Pairs whose outcome could not be known."""

    def on_outcome(self, listener: Callable[[Pair, bool], None]) -> None:
        """Registers a function that is called for every pair whose outcome is known, with True when it was eligible."""
        self._listeners.append(listener)

    def begin(self, label: Markout) -> None:
        """Goes by this label from the next pair on; forgets the pairs that wait, which were to have another."""
        self.label = label
        self._reaching.clear()
        self._waiting.clear()

    def add(self, pair: Pair) -> None:
        """A pair that was decided just now; the oldest is forgotten when too many wait."""
        if not 0 < pair.mid < math.inf:  # True for NaN
            return
        now, label = self._clock(), self.label
        if label.delay_seconds or label.price != "mid":
            self._reaching.append((now + label.delay_seconds, pair))
        else:
            self._waiting.append((now + label.horizon_seconds, pair, pair.mid))

    def settle(self) -> None:
        """Looks at the market for the pairs whose time has come."""
        now = self._clock()
        while self._reaching and self._reaching[0][0] <= now:
            due, pair = self._reaching.popleft()
            price = self._price(pair, now)
            if 0 < price < math.inf:
                self._waiting.append((due + self.label.horizon_seconds, pair, price))
            else:
                self.unknown += 1
        while self._waiting and self._waiting[0][0] <= now:
            _, pair, price = self._waiting.popleft()
            known = self._known(pair, now)
            mid = math.nan if known is None else known.mid
            if not 0 < mid < math.inf:
                self.unknown += 1
                continue
            markout_bps = 1e4 * (mid / price - 1) * (1 if pair.side == pb.SIDE_BUY else -1)
            for listener in self._listeners:
                listener(pair, markout_bps >= self.label.worst_bps)

    def _price(self, pair: Pair, now: float) -> float:
        """What the order of a pair is done at; NaN where it is not known."""
        known = self._known(pair, now)
        if known is None:
            return math.nan
        if self.label.price == "mid":
            return known.mid
        return known.ask if pair.side == pb.SIDE_BUY else known.bid

    def _known(self, pair: Pair, now: float) -> FeatureSnapshot | None:
        """What is known of a pair's instrument; None when that is too old."""
        entry = self._feature_cache.get(pair.instrument)
        return entry.snapshot if entry is not None and entry.age_seconds(now) <= _OLDEST_SECONDS else None
