"""What a model has seen: whether a vector is one that it can say something of.

Training measures it (`torchserve/domain.py`), the model's archive carries it, and a server asks it. Only features that
can change the model's score are looked at. A vector is *outside* if one of these holds:

* Other features are undefined than ever before, together.
* A value is not in the feature's range: what its definition leaves possible, and far beyond what was seen.
* Its values do not go together: the Mahalanobis distance of their normal scores is above a bound. A normal score is the
  place of a value among those that were seen, from -3 to 3. Thus no heavy tail and no busy hour makes a distance.

A feature that is stuck at a usual value, or has its sign turned, is not seen in one vector, but in many. `Watch` holds
the vectors of an instrument one after the other against two bounds:

* How often in a row a feature has had the same value, while most of the others changed: a quiet market is not stuck.
* Page's cumulative sum of the log likelihood ratio of *as it is* against *with its sign turned*, given all others, for
  features that carry a direction. It grows while the sign contradicts the other features, and most of them change.

What callers bring is not watched: it may well stay as it is, and follows no market.

All is elementwise, in the same order for any number of rows: a row has the same distance alone and among others, and
`domain_c.pyx`, where it is compiled, gives the same to the last bit. It looks at a row in a microsecond, where NumPy
takes forty for one and hardly more for 256.

Sources: P. Mahalanobis, On the Generalized Distance in Statistics (1936); E. Page, Continuous Inspection Schemes
(1954).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_cache.compiled import compiled
from feature_cache.feature_set import CALLER, ROW, FeatureSet
from feature_cache.features import MF1

LOOK_NS: Final = 200_000_000
"""Between two vectors of an instrument that `Watch` compares; the step of the samples that its bounds come from."""
_compiled: Final = compiled("feature_cache.domain_c")


class Domain:
    """What a model has seen of its features, in the order of `names`, d of them.

    Args:
        described: As it stands in the model's metadata.
        feature_set: The set that the model takes.

    Raises:
        ValueError, KeyError, TypeError: It makes no sense.
    """

    def __init__(self, described: Mapping[str, Any], feature_set: FeatureSet = MF1) -> None:
        self.feature_set: Final = feature_set
        self.names: Final = tuple(map(str, described["features"]))
        self.columns: Final = np.array([feature_set.index[name] for name in self.names], dtype=np.intp)
        d = len(self.names)
        self.is_watched: Final = np.array(
            [feature_set.features[column].source != CALLER for column in self.columns], dtype=np.bool_
        )
        """bool[d]"""
        patterns = set(map(int, described["patterns"]))
        if any(pattern < 0 or pattern >> d for pattern in patterns):
            raise ValueError("a pattern of undefined features is not of its features")
        self._patterns = {pattern.to_bytes(-(-d // 8), "little") for pattern in patterns}
        words = -(-d // 64)
        packed = b"".join(pattern.to_bytes(8 * words, "little") for pattern in sorted(patterns))
        self.patterns: Final = np.frombuffer(packed, "<u8").reshape(-1, words)
        """uint64[patterns, words]: a bit for each feature, the first one the lowest of the first word."""
        self.low, self.high = (np.array(described[end], dtype=np.float64) for end in ("low", "high"))
        values = [np.array(one, dtype=np.float64) for one in described["values"]]
        scores = [np.array(one, dtype=np.float64) for one in described["scores"]]
        self.whitening = np.array(described["whitening"], dtype=np.float64)
        """W such that the squared distance of normal scores z is |W' z|²."""
        self.most_distance: Final = float(described["distance"])
        """Squared distance above which a vector is outside."""
        self.most_same = np.array(described["most_same"], dtype=np.int64)
        self.most_turned = np.array(described["most_turned"], dtype=np.float64)
        if not self.low.shape == self.high.shape == self.most_same.shape == self.most_turned.shape == (d,):
            raise ValueError("what the model has seen is not of its features")
        if self.whitening.shape != (d, d):
            raise ValueError("what the model has seen is not of its features")
        if not all(len(one) == len(other) > 0 for one, other in zip(values, scores, strict=True)) or len(values) != d:
            raise ValueError("normal scores and values do not belong together")
        numbers = (self.low, self.high, self.whitening, self.most_turned, *values, *scores)
        if math.isnan(self.most_distance) or any(np.isnan(one).any() for one in numbers):
            raise ValueError("a bound is no number: nothing would ever be beyond it")
        # One table for all features: that of feature j begins at 2 j and is 1 long.
        self.first: Final = np.array([one[0] for one in values])
        length = np.array([one[-1] - one[0] for one in values])
        self.stretch: Final = 1 / np.where(length > 0, length, 1.0)
        self._places = 2.0 * np.arange(d)
        places = np.concatenate(
            [
                place + (one - one[0]) * stretch
                for place, one, stretch in zip(self._places.tolist(), values, self.stretch.tolist(), strict=True)
            ]
        )
        at = np.concatenate(scores)
        steps = np.diff(places)
        if (steps < 0).any():
            raise ValueError("the values of a feature are not in their order")
        slopes = np.divide(np.diff(at), steps, out=np.zeros(len(steps)), where=steps > 0)
        self.table: Final = (places, np.append(slopes, 0.0), at)
        """Values, the slopes from each to the next, and normal scores."""
        self.seen: Any = None if _compiled is None else _compiled.Seen(self)
        """The same compiled; None where it is not."""

    def are_outside(self, rows: list[bytes]) -> list[bool]:
        """The same as `outside`, of rows of `ROW`."""
        if self.seen is not None:
            found: list[bool] = self.seen.outside(rows)
            return found
        together = np.frombuffer(b"".join(rows), ROW).reshape(-1, len(self.feature_set))
        return [bool(one) for one in self.outside(together)]

    def outside(self, rows: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Whether each vector, turned for its order's side, is outside: float32[n, features of the set] → bool[n]."""
        seen = rows[:, self.columns].astype(np.float64)
        undefined = np.isnan(seen)
        beyond = (seen < self.low) | (seen > self.high)
        outside: NDArray[np.bool_] = beyond.any(axis=1) | (self._distances(seen, undefined) > self.most_distance)
        packed = np.packbits(undefined, axis=1, bitorder="little")
        outside |= np.array([one.tobytes() not in self._patterns for one in packed], dtype=np.bool_)
        return outside

    def distances(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """Squared distances: float32[n, features of the set] → float64[n]."""
        seen = rows[:, self.columns].astype(np.float64)
        return self._distances(seen, np.isnan(seen))

    def normal_scores(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """Normal scores, 0 where undefined: float32[n, features of the set] → float64[n, d]."""
        seen = rows[:, self.columns].astype(np.float64)
        return self._normal_scores(seen, np.isnan(seen))

    def _distances(self, seen: NDArray[np.float64], undefined: NDArray[np.bool_]) -> NDArray[np.float64]:
        scores = self._normal_scores(seen, undefined)
        # Not `@`: what that gives for a row depends on how many there are.
        whitened = np.zeros_like(scores)
        for j, weights in enumerate(self.whitening):
            whitened += scores[:, j, None] * weights
        whitened *= whitened
        summed: NDArray[np.float64] = np.cumsum(whitened, axis=1)[:, -1]
        return summed

    def _normal_scores(self, seen: NDArray[np.float64], undefined: NDArray[np.bool_]) -> NDArray[np.float64]:
        values, slopes, scores = self.table
        within = np.clip((seen - self.first) * self.stretch, 0.0, 1.0) + self._places
        # Not `interp`: where a processor can multiply and add in one, that may round otherwise.
        place = np.searchsorted(values, within, side="right") - 1
        found: NDArray[np.float64] = slopes[place] * (within - values[place]) + scores[place]
        found[undefined] = 0.0
        return found


class Watch:
    """The vectors of one instrument, in market orientation, one after the other.

    Args:
        domain: Of the model that decides on them.
    """

    def __init__(self, domain: Domain) -> None:
        self.domain: Final = domain
        self.same = np.zeros(len(domain.names), dtype=np.int64)
        """How often in a row each feature has kept its value while most others changed."""
        self.turned = np.zeros(len(domain.names))
        """The cumulative sum that speaks for each feature's sign being turned; 0 for one without direction."""
        self.is_implausible = False
        """Whether a feature is stuck, or turned, as far as is known."""
        self._is_signed = np.isin(domain.names, domain.feature_set.signed) & domain.is_watched
        precision = domain.whitening @ domain.whitening.T
        self._others = np.ascontiguousarray(precision * (1 - np.eye(len(domain.names))))
        self._before = np.full(len(domain.names), np.nan)
        self._next_ns = 0

    def see(self, values: NDArray[np.float32], time_ns: int) -> bool:
        """Takes a vector, unless it is too soon after the last one; returns `is_implausible`.

        Args:
            values: float32[features of the set] in market orientation.
            time_ns: When they were so, by the exchange.
        """
        if not self.is_due(time_ns):
            return self.is_implausible
        self._next_ns = time_ns + LOOK_NS
        self.is_implausible = self._take(values) if self.domain.seen is None else self._take_compiled(values)
        return self.is_implausible

    def is_due(self, time_ns: int) -> bool:
        """Whether a vector of this time would be looked at."""
        return not self._next_ns - 10 * LOOK_NS < time_ns < self._next_ns

    def _take_compiled(self, values: NDArray[np.float32]) -> bool:
        implausible: bool = self.domain.seen.see(
            values, self._before, self.same, self.turned, self._is_signed.view(np.uint8), self._others
        )
        return implausible

    def _take(self, values: NDArray[np.float32]) -> bool:
        domain = self.domain
        seen = values[None, domain.columns].astype(np.float64)
        scores = np.where(domain.is_watched, domain._normal_scores(seen, np.isnan(seen))[0], 0.0)
        # Undefined is not the same: for that there are the patterns.
        is_same = (seen[0] == self._before) & domain.is_watched
        self._before = seen[0]
        if 2 * is_same.sum() > domain.is_watched.sum():
            self.same[~is_same] = 0  # the market is quiet: what is looked at again is no further evidence
        else:
            self.same = np.where(is_same, self.same + 1, 0)
            leaning = np.zeros_like(scores)
            for others, score in zip(self._others.T, scores, strict=True):
                leaning += others * score
            # No further than twice the bound, so that the alarm ends when the feature is right again.
            turned = np.clip(self.turned + 2 * scores * leaning, 0.0, 2 * domain.most_turned)
            self.turned = np.where(self._is_signed, turned, 0.0)
        return bool((self.same > domain.most_same).any() or (self.turned > domain.most_turned).any())
