"""Recent latencies, cheap enough to record for every call."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable


class LatencyWindow:
    """Median, 95th and 99th percentile of the samples of the last seconds.

    The samples are kept in order of their size as well as of their age, so that a new one costs two insertions and not
    a sort. Old ones go with a new one, or when a percentile is read a second after the last of that. The window is
    short, so that a replica that was slow is not condemned by its past.
    """

    def __init__(
        self, clock: Callable[[], float], prior_seconds: float, window_seconds: float = 2.0, max_samples: int = 512
    ) -> None:
        self._clock = clock
        self._window_seconds = window_seconds
        self._max_samples = max_samples
        self._samples: deque[tuple[float, float]] = deque()
        self._ordered: list[float] = []
        self._refreshed = clock()
        self._prior = prior_seconds
        self._p50 = self._p95 = self._newest = prior_seconds

    def add(self, seconds: float) -> None:
        """Adds one sample."""
        now = self._clock()
        self._newest = seconds
        self._samples.append((now, seconds))
        insort(self._ordered, seconds)
        if len(self._samples) > self._max_samples:
            self._drop_oldest()
        self._refresh(now)

    def clear(self) -> None:
        """Forgets all samples."""
        self._samples.clear()
        self._ordered.clear()
        self._refresh(self._clock())

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

    @property
    def newest(self) -> float:
        """The newest sample in seconds; the prior without samples."""
        self._refresh_if_old()
        return self._newest

    @property
    def p99(self) -> float:
        """99th percentile in seconds, for people; the prior without samples."""
        self._refresh_if_old()
        ordered = self._ordered
        return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] if ordered else self._prior

    def _refresh_if_old(self) -> None:
        now = self._clock()
        if now - self._refreshed > 1.0:
            self._refresh(now)

    def _refresh(self, now: float) -> None:
        samples, ordered = self._samples, self._ordered
        while samples and now - samples[0][0] > self._window_seconds:
            self._drop_oldest()
        self._refreshed = now
        if not ordered:
            self._p50 = self._p95 = self._newest = self._prior
            return
        # Of two the quicker: the health probes of an idle replica are no more, and one may have met a busy machine.
        self._p50 = ordered[(len(ordered) - 1) // 2]
        self._p95 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]

    def _drop_oldest(self) -> None:
        _, seconds = self._samples.popleft()
        del self._ordered[bisect_left(self._ordered, seconds)]
