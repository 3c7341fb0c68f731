"""Admission control: how many decisions may be under way at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from feature_cache.constants import Constant
from server.errors import DrainingError, OverloadedError

_WINDOW_SECONDS: Final = 0.1
_MIN_SAMPLES: Final = 20
_QUANTILE: Final = 0.9
_STEEPEST_FALL: Final = 0.7
_DROPPED: Final = math.inf


def overloaded() -> OverloadedError:
    """The error of a call that is shed, here or in the gate."""
    return OverloadedError("TOO_MANY_IN_FLIGHT", "too many decisions are under way; try again shortly")


class AdmissionSettings(BaseModel):
    """How many decisions may be under way at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_in_flight: int = Field(default=512, ge=1, le=1_000_000)
    """Most decisions under way at once, at any latency; a call beyond it is shed with RESOURCE_EXHAUSTED."""
    min_in_flight: int = Field(default=96, ge=1, le=1_000_000)
    """The limit never falls below this number of decisions. A replica takes as long for a batch of this many rows as
    for one, and the orders of one `DecideBatch` are taken up 64 at a time. Lower it on a very small machine."""
    target_seconds: float = Field(default=0.03, gt=0, le=10)
    """The limit falls while one call in ten takes longer than this, in seconds. Set it below most callers'
    deadlines."""
    reserved_share: Constant[float] = 0.1
    """Share of the limit that only reduce-only orders may use."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> AdmissionSettings:
        if self.min_in_flight > self.max_in_flight:
            raise ValueError(f"min_in_flight ({self.min_in_flight}) exceeds max_in_flight ({self.max_in_flight})")
        return self


class Admission:
    """Counts decisions under way and sheds those beyond a limit that follows the latency of the ones admitted.

    Every admitted call is one of three things: *answered* after some time, *dropped* (a deadline missed, or a model
    that could not be asked in time), or neither, which says nothing: cancelled, refused, or granted so little time
    that it could hardly have been in time on an idle server.

    Per window of at least 0.1 s and 20 calls, with w = the 90th percentile of their times (infinite when dropped)::

        w <= target:  limit ← limit + √limit                     at most max_in_flight, where it starts
        w >  target:  limit ← limit · max(0.7, target / w)       at least min_in_flight

    The limit grows in every good window, used or not, so that a burst is not refused for an overload long gone. The
    last `reserved_share` of it is a lane of its own for orders that can only reduce an exposure.

    Source: Netflix concurrency-limits, `Gradient2Limit`, with a target in place of the long-term latency, which drifts
    upwards in a long overload.
    """

    def __init__(self, settings: AdmissionSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._limit = float(settings.max_in_flight)
        self._samples: list[float] = []
        self._window_started = clock()
        self.in_flight = 0
        """Decisions under way."""
        self.shed = 0
        """Decisions refused because too many were under way."""
        self.draining = False
        """True: no new decision is admitted."""

    @property
    def limit(self) -> int:
        """Decisions that may be under way now."""
        return int(self._limit)

    def admit(self, reduce_only: bool) -> Admission:
        """Admits one decision; its place is free again when the returned context is left.

        Raises:
            DrainingError: The server is about to stop.
            OverloadedError: Too many decisions are under way.
        """
        if self.draining:
            raise DrainingError("DRAINING", "the server is draining; try another one")
        limit = self.limit
        if not reduce_only:
            limit -= int(limit * self._settings.reserved_share)
        if self.in_flight >= limit:
            self.shed += 1
            raise overloaded()
        self.in_flight += 1
        return self

    def __enter__(self) -> None:
        """Nothing: `admit` has taken the place."""

    def __exit__(self, *_: object) -> None:
        self.in_flight -= 1

    def answered(self, seconds: float) -> None:
        """Counts an admitted call that was answered `seconds` after its arrival."""
        self._add(seconds)

    def dropped(self, allowed_seconds: float) -> None:
        """Counts an admitted call whose `allowed_seconds` were too short; a quarter of the target would always be."""
        if allowed_seconds > self._settings.target_seconds / 4:
            self._add(_DROPPED)

    def _add(self, seconds: float) -> None:
        samples = self._samples
        samples.append(seconds)
        now = self._clock()
        if len(samples) < _MIN_SAMPLES or now - self._window_started < _WINDOW_SECONDS:
            return
        samples.sort()
        self._adapt(samples[math.ceil(len(samples) * _QUANTILE) - 1])
        samples.clear()
        self._window_started = now

    def _adapt(self, seconds: float) -> None:
        settings = self._settings
        if seconds <= settings.target_seconds:
            self._limit = min(settings.max_in_flight, self._limit + math.sqrt(self._limit))
        else:
            self._limit = max(
                settings.min_in_flight, self._limit * max(_STEEPEST_FALL, settings.target_seconds / seconds)
            )
