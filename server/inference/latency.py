"""Recent latency of something, cheap enough for every call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

_REFRESH_EVERY: Final = 16


class LatencyWindow:
    """Median and 95th percentile of the samples of the last seconds.

    Percentiles are recomputed with each of the first 16 samples, then every 16 samples, or when read after the last
    computation grew older than a second. The window is short, so that a replica that was slow is not condemned by its
    past.
    """

    def __init__(
        self, clock: Callable[[], float], prior_seconds: float, window_seconds: float = 2.0, max_samples: int = 512
    ) -> None:
        self._clock = clock
        self._window_seconds = window_seconds
        self._samples: deque[tuple[float, float]] = deque(maxlen=max_samples)
        self._since_refresh = 0
        self._refreshed = clock()
        self._prior = prior_seconds
        self._p50 = self._p95 = self._newest = prior_seconds

    def add(self, seconds: float) -> None:
        """Adds one sample."""
        self._newest = seconds
        self._samples.append((self._clock(), seconds))
        self._since_refresh += 1
        if self._since_refresh >= _REFRESH_EVERY or len(self._samples) <= _REFRESH_EVERY:
            self._refresh()

    def clear(self) -> None:
        """Forgets all samples."""
        self._samples.clear()
        self._refresh()

    @property
    def p50(self) -> float:
        """Median in seconds; the prior without samples."""
        self._refresh_if_old()
        return self._p50

    @property
    def p95(self) -> float:
        """95th percentile in seconds; the prior without samples."""
        self._refresh_if_old()
        return self._p95

    @property
    def expected(self) -> float:
        """What the next one should take, in seconds: the median, or the newest sample where that is less.

        A recovery shows in the newest sample first. With the median alone a replica that was idle and stumbled over its
        first batches would be passed over, and so left without the samples that prove it quick, for a whole window.
        """
        return min(self.p50, self._newest)

    def _refresh_if_old(self) -> None:
        if self._clock() - self._refreshed > 1.0:
            self._refresh()

    def _refresh(self) -> None:
        now = self._clock()
        samples = self._samples
        while samples and now - samples[0][0] > self._window_seconds:
            samples.popleft()
        self._since_refresh = 0
        self._refreshed = now
        if not samples:
            self._p50 = self._p95 = self._newest = self._prior
            return
        ordered = sorted(seconds for _, seconds in samples)
        self._p50 = ordered[len(ordered) // 2]
        self._p95 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
