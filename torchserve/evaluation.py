"""How good deciders are on samples they have not seen, and how sure that is.

A decider is a model or a baseline: what it decided on each sample and, if it has one, its score. Every figure is an
estimate with a confidence interval from a block bootstrap. Samples a few hundred milliseconds apart share most of their
label's horizon, and the instruments move together, so blocks of time are drawn with replacement, each with all samples
of all instruments in it. With few blocks the interval is wide, as it should be. If dependence outlasts a block, it is
still too narrow.

Source: H. Künsch, The Jackknife and the Bootstrap for General Stationary Observations (1989); calibration error: C. Guo
et al., On Calibration of Modern Neural Networks (2017), with bins of equal width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from torchserve.dataset import Samples

BINS: Final = 10
"""Of equal width, for reliability and calibration error."""


class BootstrapSettings(BaseModel):
    """How sure figures are made out to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block_seconds: float = Field(default=10.0, gt=0)
    """Length of a block of time; at least twice what the label looks ahead is taken."""
    resamples: int = Field(default=1_000, ge=0, le=100_000)
    """Drawings of as many blocks as there are; with none there are no intervals."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Share of resamples within the interval."""
    seed: int = Field(default=1, ge=0)
    """Of the drawings."""


@dataclass(frozen=True, slots=True)
class Decided:
    """What one decider made of the samples."""

    trade: NDArray[np.bool_]
    """bool[n]"""
    score: NDArray[np.float32] | None = None
    """float32[n], probability of eligible; None for a decider without."""


class Estimate(NamedTuple):
    """A figure and its confidence interval; None where it is not defined, as precision without a trade."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """One decider on one set of samples. Shares are between 0 and 1, markouts in bps and side-signed."""

    precision: Estimate
    """Share of eligible samples among those it trades."""
    coverage: Estimate
    """Share of samples that it trades."""
    recall: Estimate
    """Share of eligible samples that it trades."""
    auc: Estimate
    """Area under the ROC curve."""
    brier: Estimate
    """Mean squared error of the score."""
    ece: Estimate
    """Expected calibration error: mean distance of score and share of eligible, by bin of the score."""
    markout_traded_bps: Estimate
    """Mean markout of what it trades."""
    markout_refused_bps: Estimate
    """Mean markout of what it refuses."""
    markout_difference_bps: Estimate
    """Traded less refused: what the decision is worth."""
    saved_bps: Estimate
    """Basis points saved per order: what the refused orders would have lost, over all orders, refused or not. It is
    what refusing may cost, on average per order; without a cost of refusing, always trading saves 0."""
    break_even_bps: Estimate
    """What refusing an order may cost before trading everything is better: the mean loss of those it refuses."""


class Blocks:
    """Samples by block of time, and drawings of these blocks.

    Args:
        samples: Not none.
        settings: See there.
    """

    def __init__(self, samples: Samples, settings: BootstrapSettings) -> None:
        self.samples: Final = samples
        block_ns = max(round(settings.block_seconds * 1e9), 2 * samples.label.span_ns)
        self.block_seconds: Final = block_ns / 1e9
        number = (samples.time_ns - samples.time_ns.min()) // block_ns
        found, self._block = np.unique(number, return_inverse=True)
        self.count: Final = len(found)
        """Blocks that hold a sample: about how many independent observations there are."""
        random = np.random.default_rng(settings.seed)
        drawn = random.multinomial(self.count, np.full(self.count, 1 / self.count), size=settings.resamples)
        # The samples as they are come first, then the resamples.
        self._draws = np.concatenate([np.ones((1, self.count), np.int64), drawn]).astype(np.float64)
        self._tails = 50 * (1 - settings.confidence)

    def figures(self, decided: Decided) -> Figures:
        """All figures of a decider."""
        samples, trade = self.samples, decided.trade
        everything = np.ones(len(trade))
        n, eligible, traded = self._sum(everything), self._sum(samples.eligible), self._sum(trade)
        right = self._sum(trade & samples.eligible)
        markout, markout_traded = self._sum(samples.markout_bps), self._sum(samples.markout_bps * trade)
        mean_traded = _ratio(markout_traded, traded)
        mean_refused = _ratio(markout - markout_traded, n - traded)
        undefined = np.full(len(n), np.nan)
        auc = brier = ece = undefined
        if decided.score is not None:
            auc = self._auc(decided.score)
            brier = _ratio(self._sum((decided.score.astype(np.float64) - samples.eligible) ** 2), n)
            ece = self._ece(decided.score, n)
        return Figures(
            precision=self._estimate(_ratio(right, traded)),
            coverage=self._estimate(_ratio(traded, n)),
            recall=self._estimate(_ratio(right, eligible)),
            auc=self._estimate(auc),
            brier=self._estimate(brier),
            ece=self._estimate(ece),
            markout_traded_bps=self._estimate(mean_traded),
            markout_refused_bps=self._estimate(mean_refused),
            markout_difference_bps=self._estimate(mean_traded - mean_refused),
            saved_bps=self._estimate(_ratio(markout_traded - markout, n)),
            break_even_bps=self._estimate(-mean_refused),
        )

    def base_rate(self) -> Estimate:
        """Share of eligible samples."""
        return self._estimate(_ratio(self._sum(self.samples.eligible), self._sum(np.ones(len(self.samples.eligible)))))

    def precision_difference(self, trade: NDArray[np.bool_], other: NDArray[np.bool_]) -> Estimate:
        """Precision of one decider less that of another, on the same drawings."""
        ours, theirs = (_ratio(self._sum(mask & self.samples.eligible), self._sum(mask)) for mask in (trade, other))
        return self._estimate(ours - theirs)

    def _sum(self, values: NDArray[np.float64] | NDArray[np.bool_]) -> NDArray[np.float64]:
        """float64[1 + resamples]: the sum of a value over the samples of each drawing."""
        sums: NDArray[np.float64] = self._draws @ np.bincount(self._block, weights=values, minlength=self.count)
        return sums

    def _ece(self, score: NDArray[np.float32], n: NDArray[np.float64]) -> NDArray[np.float64]:
        bins = _bins(score)
        distance = score.astype(np.float64) - self.samples.eligible
        return sum((np.abs(self._sum(distance * (bins == b))) for b in np.unique(bins)), np.zeros(len(n))) / n

    def _auc(self, score: NDArray[np.float32]) -> NDArray[np.float64]:
        """Share of pairs of one eligible and one other sample that the score ranks right, ties counting half."""
        order = np.argsort(score, kind="stable")
        starts = np.flatnonzero(np.diff(score[order], prepend=np.float32(-1)))
        eligible, block = self.samples.eligible[order], self._block[order]
        areas = np.empty(len(self._draws))
        for i, draw in enumerate(self._draws):
            weight = draw[block]
            positive = np.add.reduceat(weight * eligible, starts)
            negative = np.add.reduceat(weight * ~eligible, starts)
            pairs = positive.sum() * negative.sum()
            below = np.cumsum(negative) - negative / 2
            areas[i] = (positive * below).sum() / pairs if pairs else np.nan
        return areas

    def _estimate(self, values: NDArray[np.float64]) -> Estimate:
        value, resampled = float(values[0]), values[1:]
        if np.isnan(value):
            return Estimate(None)
        resampled = resampled[np.isfinite(resampled)]
        # An interval of a few resamples would be one of what happens to be defined.
        if not len(resampled) or len(resampled) < 0.9 * (len(values) - 1):
            return Estimate(value)
        low, high = np.percentile(resampled, [self._tails, 100 - self._tails])
        return Estimate(value, float(low), float(high))


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Samples whose scores lie in one bin."""

    samples: int
    mean_score: float
    eligible: float
    """Share of them."""


def reliability(score: NDArray[np.float32], eligible: NDArray[np.bool_]) -> list[ReliabilityBin]:
    """Mean score and share of eligible samples, by bin of the score; bins without a sample are left out."""
    bins = _bins(score)
    return [
        ReliabilityBin(int(inside.sum()), float(score[inside].mean()), float(eligible[inside].mean()))
        for inside in (bins == b for b in np.unique(bins))
    ]


def precision_by_coverage(
    score: NDArray[np.float32], eligible: NDArray[np.bool_], points: int = 50
) -> list[tuple[float, float]]:
    """(coverage, precision) of the cuts through the ranking at equal steps of coverage; equal scores pass together."""
    order = np.argsort(-score, kind="stable")
    last_of_equal = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    wanted = np.linspace(1 / points, 1.0, points) * len(score)
    cuts = np.unique(last_of_equal[np.searchsorted(last_of_equal + 1, wanted.round().clip(1, len(score)))])
    right = np.cumsum(eligible[order])
    return [(float((c + 1) / len(score)), float(right[c] / (c + 1))) for c in cuts]


def top_share(score: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """bool[n]: the samples with the highest scores, as many as make up this share.

    Of equal scores it takes any, always the same ones: not the earlier ones, which know another market than the later.
    """
    chosen = np.zeros(len(score), np.bool_)
    order = np.lexsort((np.random.default_rng(1).permutation(len(score)), -score))
    chosen[order[: round(share * len(score))]] = True
    return chosen


def class_balance(samples: Samples) -> Mapping[str, tuple[int, float]]:
    """Number of samples and share of eligible ones: of all, by instrument, and by side."""
    parts = {"all": np.ones(len(samples.eligible), np.bool_)}
    parts |= {name: samples.instrument == number for number, name in enumerate(samples.instruments)}
    parts |= {"buys": ~samples.sell, "sells": samples.sell}
    return {name: (int(part.sum()), float(samples.eligible[part].mean())) for name, part in parts.items() if part.any()}


def _bins(score: NDArray[np.float32]) -> NDArray[np.intp]:
    return np.minimum((score * BINS).astype(np.intp), BINS - 1)


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: NDArray[np.float64] = np.where(denominator > 0, numerator / denominator, np.nan)
    return ratio
