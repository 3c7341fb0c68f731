"""The population stability index of a sample against a reference histogram, and how large it gets without drift.

PSI = Σ (a - e) · ln(a / e) over the bins' shares in the sample (a) and in the reference (e); a bin of its own holds
what is undefined. Half a count is added to every bin, since an empty one would make it infinite.

A fixed limit such as 0.1 is a matter of luck: without drift PSI is about (1/n + 1/m) · χ² of bins - 1 degrees of
freedom (Yurdakul 2018, "Statistical properties of population stability index"), so that 0.1 is ordinary for 200 rows
and a landslide for 100,000. The limit here is a quantile of what samples of the same sizes from the reference give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
"""Of a sample's values by bin; the last one holds the undefined."""

_PSEUDO_COUNT: Final = 0.5
_DRAWS: Final = 20_000
_LONGEST_LAG: Final = 300
_UNCORRELATED: Final = 0.05


@dataclass(frozen=True, slots=True)
class Reference:
    """Where the values of a feature, or of the score, lay when the model learnt."""

    edges: tuple[float, ...]
    """Inner edges of the bins, increasing; a value belongs to the bin of the first edge that is greater than it."""
    shares: tuple[float, ...]
    """Of all values by bin, that of the undefined ones last: edges + 2 of them, with the sum 1."""
    samples: int
    """Values that it was made of."""

    @classmethod
    def of(cls, histogram: Mapping[str, Any], samples: int) -> Reference:
        """From a model's metadata.

        Raises:
            KeyError, TypeError, ValueError: It is not a histogram.
        """
        edges, undefined = tuple(map(float, histogram["edges"])), float(histogram["undefined"])
        defined = tuple(float(share) * (1 - undefined) for share in histogram["shares"]) or (0.0,)
        if len(defined) != len(edges) + 1:
            raise ValueError(f"{len(defined)} bins between {len(edges)} edges")
        return cls(edges, (*defined, undefined), samples)

    def places(self, values: NDArray[np.floating[Any]]) -> NDArray[np.intp]:
        """The bin of each value."""
        found = np.searchsorted(np.asarray(self.edges, dtype=values.dtype), values, side="right")
        return np.where(np.isnan(values), len(self.edges) + 1, found)

    def counts(self, values: NDArray[np.floating[Any]]) -> Counts:
        """The values by bin."""
        return np.bincount(self.places(values), minlength=len(self.shares)).astype(np.int64)


def references_of(metadata: Mapping[str, Any]) -> dict[str, Reference]:
    """By feature, and `score`: what a model's metadata holds."""
    samples = int(metadata["data"]["samples"])
    return {name: Reference.of(one, samples) for name, one in metadata["reference"].items()}


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


def _psi(expected: NDArray[Any], counts: NDArray[Any], pseudo_count: float) -> Any:
    e = expected + pseudo_count
    a = counts + pseudo_count
    e = e / e.sum(axis=-1, keepdims=True)
    a = a / a.sum(axis=-1, keepdims=True)
    return ((a - e) * np.log(a / e)).sum(axis=-1)


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


def correlation_time(series: NDArray[np.floating[Any]]) -> float:
    """Values of a series that together say as much as one independent value; at least 1.

    1 + 2 Σ ρ(lag) over the lags up to the first one that hardly correlates. A market's features change slowly: a
    thousand decisions within a second know one state of the book.
    """
    centred = series - series.mean()
    variance = float(centred @ centred)
    if len(series) < 3 or variance == 0:
        return 1.0
    total = 1.0
    for lag in range(1, min(_LONGEST_LAG, len(series) // 2)):
        correlation = float(centred[lag:] @ centred[:-lag]) / variance
        if correlation < _UNCORRELATED:
            break
        total += 2 * correlation
    return total
