"""Whether a model's scores are the probabilities that they are meant to be, by the labels that the market gave.

The calibration error is the mean distance of score and share of eligible, by bin of the score, as in training. Without
a fault it is not 0 but what chance makes of so few outcomes, so it comes with a limit: what the labels of a calibrated
model exceed once in a thousand comparisons.

Decisions are no observations. Those of one instrument within twice the horizon of the label share most of its outcome:
together they weigh as much as one decision alone. A bin has n = (Σ w)² / Σ w² independent observations, where w are the
weights of such groups in the bin (L. Kish, Survey Sampling, 1965). Instruments that move together make the limit too
small, which the alert's own threshold allows for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

FEWEST: Final = 30
"""Independent observations below which there is no limit."""
_BINS: Final = 10
_FALSE_ALARMS: Final = 0.001
"""Of comparisons of a calibrated model. Labels are made once a day or so, and each model has its own."""
_DRAWS: Final = 20_000


class ScoredLabel(NamedTuple):
    """A decision with its label, as far as calibration goes."""

    instrument: str
    decided_at: float
    """Seconds since the Unix epoch."""
    score: float
    eligible: bool


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scores beside outcomes; every figure counts a group of decisions that share their outcome once."""

    decisions: int
    independent: float
    """Groups."""
    predicted: float
    """Mean score."""
    observed: float
    """Share that was eligible."""
    error: float
    """Mean distance of both, by bin of the score."""
    limit: float | None
    """What the error of a calibrated model exceeds once in a thousand comparisons; None with too few labels to say."""


def calibration(labels: Sequence[ScoredLabel], horizon_seconds: float) -> Calibration | None:
    """The calibration of one model; None without a label.

    Args:
        labels: Those of the model.
        horizon_seconds: Of the labels.
    """
    if not labels:
        return None
    names, times, scored, outcomes = zip(*labels, strict=True)
    scores, eligible = np.array(scored, dtype=np.float64), np.array(outcomes, dtype=np.float64)
    numbers = (np.array(times) // (2 * horizon_seconds)).astype(np.int64)
    groups = np.unique(np.stack([np.unique(names, return_inverse=True)[1], numbers]), axis=1, return_inverse=True)[1]
    sizes = np.bincount(groups.ravel())
    weights = 1 / sizes[groups.ravel()]
    # As `quality` and training do: a model's 0.7 is a float32, which float64 has in the bin below.
    bins = np.minimum((scores.astype(np.float32) * _BINS).astype(int), _BINS - 1)
    used = np.unique(bins)
    in_bin = np.zeros((len(used), len(sizes)))
    np.add.at(in_bin, (np.searchsorted(used, bins), groups.ravel()), weights)
    total = in_bin.sum(axis=1)
    means = np.array([np.average(scores[bins == one], weights=weights[bins == one]) for one in used])
    shares = np.array([np.average(eligible[bins == one], weights=weights[bins == one]) for one in used])
    independent = float(total.sum())
    return Calibration(
        decisions=len(labels),
        independent=independent,
        predicted=float(means @ total / independent),
        observed=float(shares @ total / independent),
        error=float(np.abs(means - shares) @ total / independent),
        limit=_limit(means, total, total**2 / (in_bin**2).sum(axis=1)) if independent >= FEWEST else None,
    )


def _limit(means: np.ndarray, total: np.ndarray, observations: np.ndarray) -> float:
    """The error that a calibrated model exceeds with the probability `_FALSE_ALARMS`.

    Args:
        means: float64[bins], mean scores.
        total: float64[bins], weights.
        observations: float64[bins], independent observations.
    """
    counts = np.maximum(1, np.floor(observations)).astype(np.int64)
    random = np.random.default_rng(1)
    drawn = random.binomial(counts, np.clip(means, 0, 1), size=(_DRAWS, len(means))) / counts
    errors = np.abs(drawn - means) @ total / total.sum()
    return float(np.quantile(errors, 1 - _FALSE_ALARMS))
