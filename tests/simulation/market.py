"""The feature worker: writes a fresh vector of the instrument to Redis now and then, until it stops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from feature_cache import features
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.vectors import key_of
from simulation.desk import INSTRUMENT, MID
from simulation.guest import GUEST
from simulation.world import START_SECONDS, START_WALL_NS

if TYPE_CHECKING:
    from simulation.redis import SimulatedRedis
    from simulation.world import World

_TICK_SECONDS = 0.2


class Market:
    """The market, as its worker sees it; its clock is the true one.

    Args:
        world: Whose time it lives in.
        redis: Where it writes.
    """

    def __init__(self, world: World, redis: SimulatedRedis) -> None:
        self.world = world
        self._redis = redis
        self._sequence = 0
        self.stopped_at: float | None = None
        """From then on it writes nothing."""
        self.book_died_at: float | None = None
        """From then on trades go on arriving and the book does not."""
        self.nan_since: float | None = None
        """Since then its vectors say NaN of the book's age."""
        self.guest_stopped_at: float | None = None
        """From then on it writes nothing of the guest's set."""
        self._forgetful = False
        self.bad: list[tuple[str, float, float]] = []
        """What was wrong, from when to when."""
        self._tick()

    def _tick(self) -> None:
        if self.stopped_at is None:
            self._write()
        self.world.after(_TICK_SECONDS, self._tick)

    def _write(self) -> None:
        self._sequence += 1
        if self._forgetful and self.nan_since is None:
            self.nan_since = self.world.now
        now = START_WALL_NS + int((self.world.now - START_SECONDS) * 1e9)
        values = np.zeros(features.N_FEATURES, dtype=np.float32)
        values[features.INDEX["spread_bps"]] = 0.1
        values[features.INDEX["rv_5s_bps"]] = 1.0
        age = 0.0 if self.book_died_at is None else self.world.now - self.book_died_at
        values[features.INDEX["book_age_ms"]] = math.nan if self.nan_since is not None else 1e3 * age
        snapshot = FeatureSnapshot(
            instrument=INSTRUMENT,
            sequence=self._sequence,
            event_time_ns=now,
            book_time_ns=now - int(age * 1e9),
            trade_time_ns=now,
            publish_time_ns=now,
            transit_ns=0,
            bid=MID - 0.5,
            ask=MID + 0.5,
            state=BookState.VALID,
            values=values,
        )
        self._put(snapshot)
        if self.guest_stopped_at is None:
            own = np.array([math.nan, 0.25], dtype=np.float32)
            self._put(replace(snapshot, values=own, feature_set=GUEST))

    def _put(self, snapshot: FeatureSnapshot) -> None:
        packed, key = encode(snapshot), key_of(INSTRUMENT, snapshot.feature_set.id)
        self._redis.put(key, packed)
        self._redis.publish(key, packed)

    def stop(self) -> None:
        """Writes nothing any more."""
        if self.stopped_at is None:
            self.stopped_at = self.world.now

    def guest_stops(self) -> None:
        """Writes nothing of the guest's set any more."""
        if self.guest_stopped_at is None:
            self.guest_stopped_at = self.world.now

    def book_dies(self) -> None:
        """Trades go on, the book does not."""
        if self.book_died_at is None:
            self.book_died_at = self.world.now

    def forgets_age(self) -> None:
        """Does not know how old the book is."""
        self._forgetful = True

    def heal(self) -> None:
        """All is well."""
        now = self.world.now
        self._forgetful = False
        self.guest_stopped_at = None
        for what in ("stopped_at", "book_died_at", "nan_since"):
            since = getattr(self, what)
            if since is not None:
                self.bad.append((what, since, now))
            setattr(self, what, None)
