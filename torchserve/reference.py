"""The distributions of features and score at training time. Later ones are compared with them to detect drift.

Every feature, and the score, has one histogram. Its edges are the deciles of all instruments together. The shares are
kept by instrument, because instruments differ: a server that decides on one of them alone has not drifted by that.

Values a few hundred milliseconds apart say much the same. The histogram therefore also holds after how much time a
value is as good as independent, and how many independent values it was made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from torchserve.dataset import STEP_NS, Samples

BINS: Final = 10
"""Of a histogram; each holds about as many of the samples as any other."""
SCORE: Final = "score"
"""Name of the scores' histogram beside the features'."""

_STEP_SECONDS: Final = STEP_NS / 1e9
_UNCORRELATED: Final = 0.05


@dataclass(frozen=True, slots=True)
class ReferencePart:
    """Where the values of one instrument lay."""

    shares: list[float]
    """Of the defined values in each bin; one more than edges. Empty where no value is defined."""
    undefined: float
    """Share of NaN."""
    samples: int
    """Values, undefined ones included."""
    independent: float
    """Independent values that say as much."""


@dataclass(frozen=True, slots=True)
class ReferenceHistogram:
    """Where the values of a feature, or of the score, lay."""

    edges: list[float]
    """Inner edges, increasing: a value belongs to the bin of the first edge that is greater than it."""
    correlation_seconds: float
    """Time between two values of one instrument that are as good as independent; of the slowest instrument."""
    instruments: dict[str, ReferencePart]
    """By name; those that have samples."""


def reference_histogram(
    values: NDArray[np.floating[Any]], samples: Samples, step_seconds: float = _STEP_SECONDS
) -> ReferenceHistogram:
    """The deciles of some values, as far as they differ, and how the values of each instrument lie between them.

    Args:
        values: float[n], of these samples.
        samples: In time order.
        step_seconds: From one to the next of an instrument and a side.
    """
    defined = values[~np.isnan(values)]
    edges = np.unique(np.quantile(defined, np.linspace(0, 1, BINS + 1)[1:-1])) if len(defined) else np.empty(0)
    undefined = len(edges) + 1
    places = np.where(np.isnan(values), undefined, np.searchsorted(edges, values, side="right"))
    # A sell at the same instant repeats the buy, mirrored: it adds nothing that is independent.
    series = {name: places[samples.one_side(number)] for number, name in enumerate(samples.instruments)}
    series = {name: one for name, one in series.items() if len(one)}
    steps = max((correlation_steps(one[one != undefined]) for one in series.values()), default=1.0)
    parts = {}
    for number, name in enumerate(samples.instruments):
        if name not in series:
            continue
        counts = np.bincount(places[samples.instrument == number], minlength=undefined + 1)
        known = int(counts[:-1].sum())
        parts[name] = ReferencePart(
            shares=(counts[:-1] / known).tolist() if known else [],
            undefined=float(counts[-1] / counts.sum()),
            samples=int(counts.sum()),
            independent=len(series[name]) / steps,
        )
    return ReferenceHistogram(edges.astype(float).tolist(), steps * step_seconds, parts)


def reference_histograms(
    fitted: Samples, calibration: Samples, scores: NDArray[np.float32]
) -> dict[str, ReferenceHistogram]:
    """Of every feature, by name, on the samples that fitted the model, and of its scores where it was calibrated."""
    histograms = {name: reference_histogram(fitted.rows[:, i], fitted) for name, i in fitted.feature_set.index.items()}
    return {**histograms, SCORE: reference_histogram(scores, calibration)}


def correlation_steps(series: NDArray[Any]) -> float:
    """How many values of an evenly spaced series say as much as one independent value; at least 1.

    It is 1 + 2 Σ ρ(lag) over the lags up to the first one that hardly correlates. A series that is not much longer than
    it remembers seems to remember less than it does, because its own mean follows it: with n values each ρ is lower by
    about (1 - ρ) times the result / n. A second look adds that again.
    """
    count = len(series)
    centred = series.astype(np.float64) - (series.mean() if count else 0.0)
    variance = float(centred @ centred)
    if count < 3 or variance == 0:
        return 1.0
    spectrum = np.fft.rfft(centred, 2 * count)
    correlation = np.fft.irfft(spectrum * spectrum.conj())[: count // 2] / variance
    hidden = _correlated(correlation) / count
    return _correlated(correlation + hidden * (1 - correlation))


def _correlated(correlation: NDArray[np.float64]) -> float:
    """1 + 2 Σ ρ over the lags before the first one that hardly correlates; at least 1."""
    ends = np.flatnonzero(correlation < _UNCORRELATED)
    return max(1.0, float(1 + 2 * correlation[1 : ends[0] if len(ends) else None].sum()))
