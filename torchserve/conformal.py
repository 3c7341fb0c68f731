"""A conformal band around the threshold of a model, inside which it does not know the label well enough.

Split conformal prediction, by class (Mondrian). Scores of samples that neither fitted nor calibrated the model are
sorted by their label. `high` is a score that at most a wanted share of the samples that are *not* eligible exceeds, and
`low` one that at most this share of the eligible ones stays below. A score above both has one label left, *eligible*; a
score below both has the other one. Between them both labels are possible, or none. The band ends at `high` and begins
at the lowest of the three: both ends and the threshold. An order trades only above it, so: **of the orders that are not
eligible, at most the wanted share trades.**

The ends do not depend on the threshold, and beginning there only makes the band wider. The part of the samples that
chose the threshold may therefore place them.

What is assumed: later scores are distributed as these, given the label. Plain split conformal prediction then promises
the wanted share on average over many calibrations; half of them miss it, and with few samples that depend on each other
some by far. Therefore a smaller error is aimed at: the largest one whose Wilson interval ends at the wanted error, for
as many independent observations as the samples of the label are worth (`threshold.py`). Where there are too few for
any, the band has no end, and no order trades.

Sources: V. Vovk, A. Gammerman, G. Shafer, Algorithmic Learning in a Random World (2005), for conformal prediction by
class; V. Vovk, Conditional Validity of Inductive Conformal Predictors (2012), for a promise that holds for most
calibrations.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchserve.dataset import Samples
from torchserve.threshold import independent, wilson

WANTED_ERROR: Final = 0.1
"""Share of the orders that are not eligible which may trade."""
_HALVINGS: Final = 50


class Band(NamedTuple):
    """Scores from `low` to `high`, both included, are uncertain."""

    low: float
    """-inf where there are too few samples to say below which score an order is surely not eligible."""
    high: float
    """inf where there are too few samples to say above which score an order is surely eligible."""
    error: float
    """The wanted error, by class."""
    confidence: float
    """With which it is kept."""
    independent: tuple[float, float]
    """What the samples that are not eligible, and the eligible ones, are worth."""

    def holds(self, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Whether each score is uncertain."""
        return (scores >= np.float32(self.low)) & (scores <= np.float32(self.high))

    @property
    def described(self) -> dict[str, Any]:
        """For a model's metadata; what is infinite is null."""
        ends = {name: end if math.isfinite(end) else None for name, end in (("low", self.low), ("high", self.high))}
        return {**self._asdict(), **ends, "independent": list(self.independent)}


def conformal_band(
    scores: NDArray[np.float32],
    samples: Samples,
    threshold: float,
    *,
    error: float = WANTED_ERROR,
    confidence: float,
) -> Band:
    """The band of a model, from the scores of samples that have neither fitted nor calibrated it.

    Args:
        scores: float32[n] of the samples.
        samples: In any order.
        threshold: Of the model.
        error: See `WANTED_ERROR`.
        confidence: With which the error is kept.
    """
    high, worth_no = _end(scores, samples, np.flatnonzero(~samples.eligible), error, confidence)
    negative_low, worth_yes = _end(-scores, samples, np.flatnonzero(samples.eligible), error, confidence)
    return Band(min(-negative_low, high, threshold), high, error, confidence, (worth_no, worth_yes))


def split_conformal(scores: NDArray[np.floating[Any]], error: float) -> float:
    """The ceil((n + 1) (1 - error))-th smallest of n scores; inf where there is none.

    A further score from the same distribution exceeds it with a probability of at most `error`.
    """
    # 20 * 0.1 is not to become 3 because binary fractions are not exact.
    rank = math.ceil((len(scores) + 1) * (1 - error) - 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def aimed_at(error: float, independent_scores: float, confidence: float) -> float:
    """The largest error whose interval, with so many independent scores, ends at the wanted one; 0 for none."""
    low, high = 0.0, error
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        _, worst = wilson(middle, independent_scores, confidence)
        low, high = (middle, high) if worst <= error else (low, middle)
    return low


def _end(
    scores: NDArray[np.float32], samples: Samples, chosen: NDArray[np.intp], error: float, confidence: float
) -> tuple[float, float]:
    """A score that a later one of these samples exceeds with at most this probability, and what they are worth."""
    if not len(chosen):
        return math.inf, 0.0
    own, part = scores[chosen], samples.take(chosen)
    # Independent observations of exceeding the end, not of the label, which is the same in all of them.
    exceeding = own > np.float32(min(split_conformal(own, error), 2.0))
    worth = independent(replace(part, eligible=exceeding), np.ones(len(chosen), np.bool_))
    return split_conformal(own, aimed_at(error, worth, confidence)), worth
