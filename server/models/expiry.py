"""How long the models that answer may still decide.

A model expires on the market's clock: the guard compares its expiry with the instant of the market that it decides on
(`fallback/guards.py`). Here the newest instant of all instruments stands for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feature_cache.store.l1 import FeatureCache


class ModelExpiry:
    """Tells when models expire.

    Args:
        feature_cache: Knows the market's newest instant.
        grace_seconds: How long an operator lets models decide after their expiry.
    """

    def __init__(self, feature_cache: FeatureCache, grace_seconds: Callable[[], float]) -> None:
        self._feature_cache = feature_cache
        self._grace_seconds = grace_seconds

    def left_seconds(self, expires_at: int) -> float | None:
        """Seconds of the market until the model's answers are ABSTAIN, negative once they are.

        None for a model that does not expire, and while no market is known.

        Args:
            expires_at: The model's own, Unix seconds; 0 for never.
        """
        if not expires_at:
            return None
        entries = (self._feature_cache.get(name) for name in self._feature_cache.instruments)
        newest = max((entry.snapshot.event_time_ns for entry in entries if entry is not None), default=None)
        return None if newest is None else expires_at + self._grace_seconds() - newest / 1e9
