"""The population stability index of a sample against a reference histogram, and how large it gets without drift.

PSI = Σ (a - e) · ln(a / e) over the bins' shares in the sample (a) and in the reference (e); a bin of its own holds
what is undefined. Half a count is added to every bin, since an empty one would make it infinite.

A fixed limit such as 0.1 is a matter of luck: without drift PSI is about (1/n + 1/m) · χ² of bins - 1 degrees of
freedom (Yurdakul 2018, "Statistical properties of population stability index"), so that 0.1 is ordinary for 200 rows
and a landslide for 100,000. The limit here is a quantile of what samples of the same sizes from the reference give.

The sizes n and m are those of independent values. A market's features change slowly, and a thousand decisions within a
second know one state of the book. The reference says after how much time a value is as good as independent
(`correlation_seconds`), and values whose correlation dies out exponentially in that time are counted by

    n_independent = n² / Σ_ij exp(-|t_i - t_j| / τ),    τ = correlation_seconds / 2

which is the number of independent values whose mean is as exact as that of these. PSI is taken of counts scaled down to
that number, as its limit is. Both are made of the same number of values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
"""Of a sample's values by bin; the last one holds the undefined."""

_PSEUDO_COUNT: Final = 0.5
_DRAWS: Final = 20_000
_SMALLEST_WEIGHT: Final = 0.05
"""To what weights are rounded where a limit is simulated, so that simulated limits can be kept."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How values lie between the edges."""

    shares: tuple[float, ...]
    """Of all values by bin, that of the undefined ones last: edges + 2 of them, with the sum 1."""
    independent: float
    """Independent values that they were made of."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Where the values of a feature, or of the score, lay when the model learnt."""

    edges: tuple[float, ...]
    """Inner edges of the bins, increasing; a value belongs to the bin of the first edge that is greater than it."""
    correlation_seconds: float
    """Time between two values of one instrument that are as good as independent."""
    instruments: Mapping[str, Shares]
    """By name; at least one."""

    @classmethod
    def of(cls, histogram: Mapping[str, Any]) -> Reference:
        """From a model's metadata.

        Raises:
            KeyError, TypeError, ValueError: It is not a histogram.
        """
        edges = tuple(map(float, histogram["edges"]))
        instruments = {name: _shares(part, len(edges) + 1) for name, part in histogram["instruments"].items()}
        if not instruments:
            raise ValueError("a histogram without values")
        return cls(edges, float(histogram["correlation_seconds"]), instruments)

    def places(self, values: NDArray[np.floating[Any]]) -> NDArray[np.intp]:
        """The bin of each value."""
        found = np.searchsorted(np.asarray(self.edges, dtype=values.dtype), values, side="right")
        return np.where(np.isnan(values), len(self.edges) + 1, found)

    def counts(self, values: NDArray[np.floating[Any]]) -> Counts:
        """The values by bin."""
        return np.bincount(self.places(values), minlength=len(self.edges) + 2).astype(np.int64)

    def mixed(self, weights: Mapping[str, float]) -> Shares:
        """What a sample of this mixture of instruments is to be like.

        An instrument that the model has not learnt from counts as all that it has learnt from together.

        Args:
            weights: Share of each instrument in the sample; the sum is 1.
        """
        parts = [(weight, self.instruments[name]) for name, weight in weights.items() if name in self.instruments]
        others = 1 - sum(weight for weight, _ in parts)
        if others > 1e-9 or not parts:
            parts.append((others, _together(self.instruments.values())))
        shares = sum((weight * np.asarray(part.shares) for weight, part in parts), np.zeros(len(self.edges) + 2))
        spread = sum(weight**2 / part.independent for weight, part in parts)
        return Shares(tuple(shares.tolist()), 1 / spread)


def references_of(metadata: Mapping[str, Any]) -> dict[str, Reference]:
    """By feature, and `score`: what a model's metadata holds.

    Raises:
        KeyError, TypeError, ValueError: It holds no histograms.
    """
    return {name: Reference.of(one) for name, one in metadata["reference"].items()}


def independent_values(times: NDArray[np.float64], correlation_seconds: float) -> float:
    """Independent values that say as much as one series of values; see the module.

    Args:
        times: float64[n] in s, when the values were, in order.
        correlation_seconds: Time between two of them that are as good as independent.
    """
    decay = np.exp(-2 * np.diff(times) / correlation_seconds) if correlation_seconds > 0 else np.zeros(len(times) - 1)
    total, reached = float(len(times)), 0.0
    for factor in decay.tolist():
        reached = (reached + 1) * factor
        total += 2 * reached
    return len(times) ** 2 / total if len(times) else 0.0


def psi(
    expected: Sequence[float], expected_of: float, counts: NDArray[Any], pseudo_count: float = _PSEUDO_COUNT
) -> Any:
    """The index of one sample, or of many along the first axis.

    Args:
        expected: The reference's shares.
        expected_of: Values that those were made of.
        counts: The sample's values by bin, or float; [bins] or [samples, bins].
        pseudo_count: Added to every bin of both.
    """
    return _psi(np.asarray(expected) * expected_of, counts, pseudo_count)


@lru_cache(maxsize=4096)
def limit(shares: tuple[float, ...], reference_of: int, sample_of: int, alpha: float) -> float:
    """The PSI that a sample without drift exceeds with probability `alpha`.

    Args:
        shares: The reference's.
        reference_of: Independent values in the reference.
        sample_of: Independent values in the sample.
        alpha: Probability of a false alarm.
    """
    random = np.random.default_rng(1)
    p = np.asarray(shares) / sum(shares)
    references = random.multinomial(reference_of, p, size=_DRAWS)
    samples = random.multinomial(sample_of, p, size=_DRAWS)
    return float(np.quantile(_psi(references, samples, _PSEUDO_COUNT), 1 - alpha))


def rounded_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights in few steps, with the sum 1."""
    steps = {name: max(1, round(weight / _SMALLEST_WEIGHT)) for name, weight in weights.items()}
    return {name: count / sum(steps.values()) for name, count in steps.items()}


def rounded_size(size: float) -> int:
    """A number of values to two digits, downwards, so that simulated limits can be kept; at least 2."""
    step = int(10 ** max(0, len(str(int(size))) - 2))
    return max(2, int(size) // step * step)


def _psi(expected: NDArray[Any], counts: NDArray[Any], pseudo_count: float) -> Any:
    e = expected + pseudo_count
    a = counts + pseudo_count
    e = e / e.sum(axis=-1, keepdims=True)
    a = a / a.sum(axis=-1, keepdims=True)
    return ((a - e) * np.log(a / e)).sum(axis=-1)


def _shares(part: Mapping[str, Any], bins: int) -> Shares:
    """One instrument's part of a histogram with this number of bins for what is defined."""
    undefined, independent = float(part["undefined"]), float(part["independent"])
    defined = tuple(float(share) * (1 - undefined) for share in part["shares"]) or (0.0,) * bins
    if len(defined) != bins:
        raise ValueError(f"{len(defined)} bins between {bins - 1} edges")
    if independent <= 0:
        raise ValueError("a histogram without values")
    return Shares((*defined, undefined), independent)


def _together(parts: Iterable[Shares]) -> Shares:
    """Several instruments as one, each with the weight of its independent values."""
    known = list(parts)
    weights = np.array([part.independent for part in known])
    shares = np.average([part.shares for part in known], axis=0, weights=weights)
    return Shares(tuple(shares.tolist()), float(weights.sum()))
