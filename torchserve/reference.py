"""The distributions of features and score at training time. Later ones are compared with them to detect drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_cache import features

BINS: Final = 10
"""Of a histogram; each holds about as many of the samples as any other."""
SCORE: Final = "score"
"""Name of the scores' histogram beside the features'."""


@dataclass(frozen=True, slots=True)
class ReferenceHistogram:
    """Where the values of a feature, or of the score, lay."""

    edges: list[float]
    """Inner edges, increasing: a value belongs to the bin of the first edge that is greater than it."""
    shares: list[float]
    """Of the defined values in each bin; one more than edges."""
    undefined: float
    """Share of NaN."""


def reference_histogram(values: NDArray[np.float32]) -> ReferenceHistogram:
    """The deciles of some values, as far as they differ, and the share of values between them."""
    defined = values[~np.isnan(values)]
    undefined = 1 - len(defined) / len(values) if len(values) else 0.0
    if not len(defined):
        return ReferenceHistogram([], [], undefined)
    edges = np.unique(np.quantile(defined, np.linspace(0, 1, BINS + 1)[1:-1]))
    counts = np.bincount(np.searchsorted(edges, defined, side="right"), minlength=len(edges) + 1)
    return ReferenceHistogram(edges.astype(float).tolist(), (counts / len(defined)).tolist(), undefined)


def reference_histograms(rows: NDArray[np.float32], scores: NDArray[np.float32]) -> dict[str, ReferenceHistogram]:
    """Of every feature, by name, and of the scores."""
    histograms = {name: reference_histogram(rows[:, i]) for name, i in features.INDEX.items()}
    return {**histograms, SCORE: reference_histogram(scores)}
