"""The retry budget: a share of recent traffic, so that second attempts can never multiply an outage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from feature_cache.constants import Constant

_SECONDS: Final = 10


class RetrySettings(BaseModel):
    """How many second attempts at a model are allowed. A hedge counts like a retry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(default=0.1, ge=0, le=1)
    """Retries allowed per first attempt of the last 10 s. Raise it only if your replicas can bear more load while one
    fails."""
    per_second: Constant[float] = 1.0
    """Retries allowed on top, per second."""
    hedge: bool = False
    """Ask the other replica as well when the first attempt takes longer than the recent p95; the first score wins. Turn
    it on to shorten the slowest decisions at the cost of more calls to the replicas."""


class RetryBudget:
    """Grants a retry while those of the last 10 s stay within share · attempts + 10 s · per_second."""

    def __init__(self, settings: RetrySettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._attempts = [0] * _SECONDS
        self._retries = [0] * _SECONDS
        self._newest = int(clock())

    def count_attempts(self, attempts: int = 1) -> None:
        """Counts first attempts."""
        self._attempts[self._advance()] += attempts

    def try_take(self) -> bool:
        """Takes one retry if the budget has one."""
        bucket = self._advance()
        allowed = self._settings.share * sum(self._attempts) + self._settings.per_second * _SECONDS
        if sum(self._retries) + 1 > allowed:
            return False
        self._retries[bucket] += 1
        return True

    def _advance(self) -> int:
        """Clears the seconds that have passed and returns the current one's place."""
        current = int(self._clock())
        for second in range(max(self._newest + 1, current - _SECONDS + 1), current + 1):
            self._attempts[second % _SECONDS] = self._retries[second % _SECONDS] = 0
        self._newest = max(self._newest, current)
        return self._newest % _SECONDS
