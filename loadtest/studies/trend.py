"""Whether a series of samples is flat: the verdict of a soak.

A process that leaks grows for as long as it is used; one that fills its caches grows at first and then stops. So the
beginning is left out, and the trend of the rest counts:

    growth  = Theil–Sen slope of the samples after the warm-up × the time they span
    allowed = max(absolute allowance, relative allowance × median of those samples)
    flat    ⇔ growth ≤ allowed

The Theil–Sen slope is the median of the slopes between all pairs of samples. It is the slope of a line through most of
them: up to 29 % of the samples may be outliers (a garbage collection, a burst) without moving it far. Shrinking is
always flat.

Source: P. K. Sen, Estimates of the Regression Coefficient Based on Kendall's Tau, JASA 63 (1968).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_FEWEST_SAMPLES: Final = 5
_MOST_SAMPLES: Final = 2_000
"""More are thinned out evenly: all pairs of these are 2 million."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a series may grow while it counts as flat; the larger of both."""

    absolute: float
    """In the unit of the series."""
    relative: float
    """Share of the median, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Trend:
    """What became of one series after the warm-up; all but `samples` in its unit."""

    samples: int
    first: float
    """Median of the first tenth."""
    last: float
    """Median of the last tenth."""
    highest: float
    growth: float
    """By the slope, over the time that the samples span."""
    growth_per_hour: float
    allowed: float
    """What `growth` may be."""

    @property
    def flat(self) -> bool:
        """Whether it grew no more than allowed."""
        return self.growth <= self.allowed


def trend(times: Sequence[float], values: Sequence[float], allowance: Allowance, warm_up_seconds: float) -> Trend:
    """The trend of one series.

    Args:
        times: Seconds, ascending, one of each sample.
        values: The samples; NaN where one is missing.
        allowance: What it may grow.
        warm_up_seconds: Samples of so many seconds after the first are left out.

    Raises:
        ValueError: Fewer than 5 samples are left.
    """
    at, of = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    kept = ~np.isnan(of)
    if kept.any():
        kept &= at >= at[kept][0] + warm_up_seconds
    at, of = at[kept], of[kept]
    if len(at) < _FEWEST_SAMPLES:
        raise ValueError(f"a trend needs {_FEWEST_SAMPLES} samples after the warm-up, there are {len(at)}")
    slope = _theil_sen(at, of)
    tenth = math.ceil(len(of) / 10)
    return Trend(
        samples=len(of),
        first=float(np.median(of[:tenth])),
        last=float(np.median(of[-tenth:])),
        highest=float(of.max()),
        growth=slope * float(at[-1] - at[0]),
        growth_per_hour=3600 * slope,
        allowed=max(allowance.absolute, allowance.relative * float(np.median(of))),
    )


def _theil_sen(at: NDArray[np.float64], of: NDArray[np.float64]) -> float:
    """Median slope over all pairs of samples."""
    step = math.ceil(len(at) / _MOST_SAMPLES)
    at, of = at[::step], of[::step]
    earlier, later = np.triu_indices(len(at), k=1)
    apart = at[later] - at[earlier]
    slopes = (of[later] - of[earlier])[apart > 0] / apart[apart > 0]
    return float(np.median(slopes))
