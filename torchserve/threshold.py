"""The threshold of a model: the lowest cut that is sure enough to be as precise as wanted.

*Sure* means that the lower end of the precision's confidence interval reaches the target, not the precision itself: of
many cuts one always looks good. The interval is Wilson's, for as many observations as the traded samples are worth::

    independent = min(distinct, p * (1 - p) / variance)

* `distinct` are the pairs of an instrument and a bucket of time with a traded sample. A bucket is as long as the label
  looks ahead: the labels of two samples in one share the market's move.
* `variance` is that of the precision p when spans of time are drawn, each with all samples of all instruments in it:
  sum((eligible - p * traded) ** 2) / traded ** 2 over the spans, which are twice as long. It finds what instruments
  share, and what lasts longer than a bucket. Without a failure it says nothing, and `distinct` stands alone.

Sources: E. Wilson, Probable Inference, the Law of Succession, and Statistical Inference (1927); W. Cochran, Sampling
Techniques, chapter 12, for the variance of a ratio by clusters.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchserve.dataset import Samples

CUTS: Final = 40
"""Cuts that are looked at, at equal steps of coverage: with every one the best would be better by chance."""


class Cut(NamedTuple):
    """A threshold and what the samples that chose it say of it."""

    threshold: float
    """`score >= threshold` trades; exactly representable as float32."""
    precision: float
    """Share of eligible samples among the traded ones."""
    low: float
    """Lower end of its confidence interval."""
    coverage: float
    """Share of samples that are traded."""
    traded: int
    """Samples."""
    independent: float
    """Independent observations that they are worth."""
    reached: bool
    """Whether `low` reaches the target."""


NOTHING: Final = Cut(math.inf, math.nan, 0.0, 0.0, 0, 0.0, reached=False)
"""A cut that no score reaches."""


def wilson(
    share: float | NDArray[np.float64], number: float | NDArray[np.float64], confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wilson's interval of a share of so many independent observations: both ends, float64 of the same shape."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, n = np.asarray(share, np.float64), np.asarray(number, np.float64)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def independent(samples: Samples, chosen: NDArray[np.bool_]) -> float:
    """How many independent observations of the label the chosen samples are worth; 0 for none."""
    index = np.flatnonzero(chosen)
    return float(_Growing(samples.take(index)).independent[-1]) if len(index) else 0.0


def needed(share: float, half_width: float, confidence: float) -> float:
    """How many independent observations a share needs for an interval of plus and minus so much: z² p (1 - p) / w²."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return z * z * share * (1 - share) / (half_width * half_width)


def choose_threshold(
    scores: NDArray[np.float32],
    samples: Samples,
    *,
    target_precision: float,
    minimum_coverage: float,
    confidence: float,
) -> Cut:
    """The lowest cut that reaches the target for sure; if none does, the one whose lower end is highest.

    Args:
        scores: float32[n] of the samples, none of which has fitted or calibrated the model.
        samples: Not none.
        target_precision: Share of traded samples that shall be eligible.
        minimum_coverage: Smallest share of samples that a cut must trade.
        confidence: Of the two-sided interval.
    """
    order = np.argsort(-scores, kind="stable")
    descending = scores[order]
    grown = _Growing(samples.take(order))
    # Equal scores pass together: only the last of them is a place to cut.
    last_of_equal = np.flatnonzero(np.append(descending[1:] != descending[:-1], True))
    wanted = np.ceil(np.linspace(minimum_coverage, 1.0, CUTS) * len(scores)) - 1
    cuts = np.unique(last_of_equal[np.searchsorted(last_of_equal, wanted)])
    low, _ = wilson(grown.precision[cuts], grown.independent[cuts], confidence)
    reaching = np.flatnonzero(low >= target_precision)
    # The last of equally sure cuts has the most coverage.
    best = int(reaching[-1] if len(reaching) else np.flatnonzero(low == low.max())[-1])
    cut = int(cuts[best])
    return Cut(
        threshold=float(descending[cut]),
        precision=float(grown.precision[cut]),
        low=float(low[best]),
        coverage=(cut + 1) / len(scores),
        traded=cut + 1,
        independent=float(grown.independent[cut]),
        reached=len(reaching) > 0,
    )


class _Growing:
    """What the first samples amount to, for every number of them: float64[n] each."""

    def __init__(self, samples: Samples) -> None:
        number = np.arange(1, len(samples.eligible) + 1, dtype=np.float64)
        eligible = samples.eligible.astype(np.float64)
        self.precision = np.cumsum(eligible) / number
        bucket = samples.time_ns // samples.label.span_ns
        pair = bucket * len(samples.instruments) + samples.instrument
        is_new = np.zeros(len(number))
        is_new[np.unique(pair, return_index=True)[1]] = 1
        distinct = np.cumsum(is_new)
        squares = self._squares(bucket // 2, eligible)
        p = self.precision
        # Sum over the spans of (eligible - p * traded) ** 2; 0 * inf would be undefined.
        spread = np.maximum(squares[0] - 2 * p * squares[1] + p * p * squares[2], 1e-12)
        worth = p * (1 - p) * number * number / spread
        self.independent = np.minimum(np.where(p * (1 - p) > 0, worth, np.inf), distinct)

    def _squares(self, span: NDArray[np.int64], eligible: NDArray[np.float64]) -> NDArray[np.float64]:
        """Σ E², Σ E·N and Σ N² over the spans, E eligible ones of N samples each: float64[3, n]."""
        by_span = np.argsort(span, kind="stable")
        starts = np.flatnonzero(np.diff(span[by_span], prepend=span[by_span][0] - 1))
        first = np.repeat(starts, np.diff(np.append(starts, len(span))))
        earlier = np.arange(len(span)) - first
        total = np.cumsum(eligible[by_span])
        earlier_eligible = total - eligible[by_span] - (total - eligible[by_span])[first]
        grows = np.empty((3, len(span)))
        e = eligible[by_span]
        grows[:, by_span] = (
            e * (2 * earlier_eligible + 1),
            earlier_eligible + e * (earlier + 1),
            2 * earlier + 1,
        )
        return np.cumsum(grows, axis=1)
