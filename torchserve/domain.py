"""Measures what a model has seen of its features, for `feature_cache/domain.py`, which says what each part is for.

The part of the samples that fitted the model says where values lie and how they go together. The parts after it, which
set its calibration and its threshold, say how far later vectors are from that: the bounds are those of the farthest,
with a margin. Nothing here looks at a label.

A card shows what the bounds catch: features of later samples that are corrupted on purpose, each in turn.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import xgboost
from numpy.typing import NDArray

from feature_cache.domain import LOOK_NS, Domain, Watch
from feature_cache.feature_set import Feature, FeatureSet
from torchserve.dataset import Samples
from torchserve.fitting import Fitted

_SHARES: Final = (0.001, 0.005, *(number / 100 for number in range(1, 100, 3)), 0.995, 0.999)
"""Quantiles that the table of normal scores is made of."""
_SHRINKAGE: Final = 0.02
"""Weight of uncorrelated features in the correlation: it bounds what a nearly exact relation of two can do."""
_FAR: Final = 5.0
"""A range reaches so many times as far from the median as all but one in a thousand of the values that were seen."""
_ENDS: Final = (0.001, 0.999)
_DISTANCE_MARGIN: Final = 1.25
_WATCH_MARGIN: Final = 2.0
_LEAST_SAME: Final = 10
"""Looks: two seconds of market."""
_LEAST_TURNED: Final = 40.0
"""Log likelihood ratio. It would be e^40 to 1 if looks were independent and normal scores normal; neither is so."""
_DIGITS: Final = 9
"""Of what is written: the last bits of a sum are no part of a model."""
_SEED: Final = 1
_LOOK_SECONDS: Final = LOOK_NS / 1e9
CORRUPTIONS: Final = ("frozen", "sign turned", "times 1000", "undefined")
"""What a card does to a feature: it keeps a value that it had, changes sign, is scaled, is NaN."""


def read_by(fitted: Fitted, feature_set: FeatureSet) -> list[str]:
    """Names of the features that can change a model's score: all of a network, those of any split of trees."""
    if fitted.network is not None:
        return list(feature_set.names)
    booster = xgboost.Booster()
    booster.load_model(bytearray(fitted.weights))
    split = booster.get_score(importance_type="weight")
    return [name for number, name in enumerate(feature_set.names) if f"f{number}" in split]


def domain_of(
    fitted: Fitted, train: Samples, later: Samples, step_seconds: float = _LOOK_SECONDS
) -> dict[str, Any] | None:
    """What a model has seen, for its metadata; None for one that looks at nothing.

    Args:
        fitted: The model.
        train: What fitted it.
        later: What came after that, but nothing that measures it.
        step_seconds: From one sample to the next of an instrument and a side. What is longer than a look stands for as
            many looks.
    """
    feature_set = train.feature_set
    names = read_by(fitted, feature_set)
    if not names:
        return None
    columns = [feature_set.index[name] for name in names]
    known = train.rows[:, columns].astype(np.float64)
    both = np.concatenate([known, later.rows[:, columns].astype(np.float64)])
    tables = [_normal_scores(known[:, j]) for j in range(len(names))]
    described = {
        "features": names,
        "patterns": _patterns(np.isnan(both)),
        **_ranges([feature_set.features[column] for column in columns], both),
        "values": [values for values, _ in tables],
        "scores": [scores for _, scores in tables],
        "whitening": np.eye(len(names)).tolist(),
        "distance": np.inf,
        "most_same": [0] * len(names),
        "most_turned": [0.0] * len(names),
    }
    described["whitening"] = _whitening(Domain(described, feature_set), train.rows)
    distances = Domain(described, feature_set).distances(later.rows)
    described["distance"] = _rounded(_DISTANCE_MARGIN * float(distances.max()))
    same, turned = _longest(Domain({**described, "most_turned": [np.inf] * len(names)}, feature_set), (train, later))
    if step_seconds > _LOOK_SECONDS:
        looks = step_seconds / _LOOK_SECONDS
        same, turned = (same + 1) * looks, turned * looks
    described["most_same"] = np.maximum(_LEAST_SAME, np.ceil(_WATCH_MARGIN * same)).astype(int).tolist()
    described["most_turned"] = [_rounded(one) for one in np.maximum(_LEAST_TURNED, _WATCH_MARGIN * turned)]
    return described


def _patterns(undefined: NDArray[np.bool_]) -> list[int]:
    """Which features were undefined together: for each pattern a number with a bit for each feature."""
    packed = np.unique(np.packbits(undefined, axis=1, bitorder="little"), axis=0)
    return sorted(int.from_bytes(one.tobytes(), "little") for one in packed)


def _normal_scores(values: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Values and the normal scores of them; equal values have the mean of theirs."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return [0.0], [0.0]
    scores = np.array([NormalDist().inv_cdf(share) for share in _SHARES])
    quantiles, place = np.unique(np.quantile(defined, _SHARES), return_inverse=True)
    means = np.bincount(place, scores) / np.bincount(place)
    return quantiles.tolist(), [_rounded(one) for one in means]


def _ranges(features: Sequence[Feature], values: NDArray[np.float64]) -> dict[str, list[float]]:
    """The lowest and the highest value of each feature, within what its definition leaves possible."""
    low, high = [], []
    for feature, column in zip(features, values.T, strict=True):
        defined = column[~np.isnan(column)]
        middle, first, last = np.quantile(defined, (0.5, *_ENDS)) if len(defined) else (0.0, 0.0, 0.0)
        low.append(_rounded(max(feature.lowest, float(middle - _FAR * (middle - first)))))
        high.append(_rounded(min(feature.highest, float(middle + _FAR * (last - middle)))))
    return {"low": low, "high": high}


def _whitening(domain: Domain, rows: NDArray[np.float32]) -> list[list[float]]:
    """W with W W' the inverse of the shrunk correlation of the normal scores."""
    scores = domain.normal_scores(rows)
    d = scores.shape[1]
    correlation = np.empty((d, d))
    for i in range(d):
        for j in range(i + 1):
            # Not `@`, whose last bits go by how many threads there are.
            correlation[i, j] = correlation[j, i] = (scores[:, i] * scores[:, j]).mean()
    shrunk = (1 - _SHRINKAGE) * correlation + _SHRINKAGE * np.eye(d)
    return [[_rounded(one) for one in row] for row in np.linalg.cholesky(np.linalg.inv(shrunk)).tolist()]


def _longest(domain: Domain, parts: Sequence[Samples]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The longest run of equal values, and the largest cumulative sum, of each feature."""
    same, turned = np.zeros(len(domain.names)), np.zeros(len(domain.names))
    for part in parts:
        for rows, times in series_of(part):
            watch = Watch(domain)
            for row, time_ns in zip(rows, times.tolist(), strict=True):
                watch.see(row, time_ns)
                same, turned = np.maximum(same, watch.same), np.maximum(turned, watch.turned)
    return same, turned


def series_of(samples: Samples) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """The vectors of each instrument in market orientation, in time order, and their times."""
    for number in range(len(samples.instruments)):
        series = samples.one_side(number)
        if len(series):
            rows = samples.rows[series]
            if samples.sell[series[0]]:
                rows = samples.feature_set.for_sell(rows)
            yield rows, samples.time_ns[series]


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


@dataclass(frozen=True, slots=True)
class Caught:
    """What became of a feature that was corrupted in a series of vectors."""

    feature: str
    corruption: str
    at_once: float
    """Share of the changed vectors that are outside by themselves."""
    watched: float
    """Share of the vectors that are refused when they come one after the other, from the first changed one on."""
    seconds: float | None
    """Until the first one is refused in the slowest instrument; None where one is not refused at all."""


@dataclass(frozen=True, slots=True)
class Alarms:
    """False alarms on samples as they are: shares."""

    at_once: float
    watched: float
    """At once, or because of those before."""


def false_alarms(domain: Domain, samples: Samples) -> Alarms:
    """How many of some samples are refused that nothing is wrong with."""
    refused = [_refused(domain, rows, time_ns) for rows, time_ns in series_of(samples)]
    return Alarms(float(domain.outside(samples.rows).mean()), _share(refused))


def caught(domain: Domain, samples: Samples, looked_at: Container[str]) -> list[Caught]:
    """What of some samples is refused when one of these features is corrupted from their beginning on; each in turn."""
    random = np.random.default_rng(_SEED)
    found = []
    for name, column in zip(domain.names, domain.columns.tolist(), strict=True):
        for corruption in CORRUPTIONS if name in looked_at else ():
            at_once, watched, seconds = [], [], []
            for rows, time_ns in series_of(samples):
                changed_rows = rows.copy()
                changed_rows[:, column] = _corrupted(corruption, rows[:, column], random)
                differs = ~((changed_rows[:, column] == rows[:, column]) | np.isnan(rows[:, column]))
                if not differs.any():
                    continue
                first = int(np.argmax(differs))
                refused = _refused(domain, changed_rows, time_ns)[first:]
                at_once.append(domain.outside(changed_rows[differs]))
                watched.append(refused)
                when = (time_ns[first:][refused][0] - time_ns[first]) / 1e9 if refused.any() else None
                seconds.append(when)
            if at_once:
                slowest = None if None in seconds else max(one for one in seconds if one is not None)
                found.append(Caught(name, corruption, _share(at_once), _share(watched), slowest))
    return found


def _share(parts: Sequence[NDArray[np.bool_]]) -> float:
    return float(np.concatenate(parts).mean())


def _corrupted(corruption: str, values: NDArray[np.float32], random: np.random.Generator) -> Any:
    if corruption == "frozen":
        return random.choice(values[~np.isnan(values)]) if (~np.isnan(values)).any() else np.float32(np.nan)
    return {"sign turned": -values, "times 1000": values * np.float32(1000), "undefined": np.float32(np.nan)}[
        corruption
    ]


def _refused(domain: Domain, rows: NDArray[np.float32], time_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """What a server refuses of vectors that come one after the other: bool[n]."""
    watch = Watch(domain)
    seen = np.array([watch.see(row, time) for row, time in zip(rows, time_ns.tolist(), strict=True)], dtype=np.bool_)
    return seen | domain.outside(rows)
