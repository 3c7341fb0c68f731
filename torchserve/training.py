"""Fits, calibrates and measures models: the champion (a few monotone features) and the challenger (a Torch network).

Samples are split in time order into five parts: the first fits the model, the second says when to stop, the third
calibrates it, the fourth sets its threshold (`threshold.py`), the fifth measures it. Between two parts is a gap of
twice what the label looks ahead. The first keeps every label of one part free of prices of the next (purging). The
second is there because prices just after a label's are still much like it (embargo).

The calibration is Platt's curve, not isotonic regression. With two parameters it follows minutes of samples that
overlap without following their noise. Isotonic steps would tie the best scores together, which is where the threshold
lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from feature_cache.features import MF1
from feature_cache.har import Forecast
from torchserve.conformal import Band, conformal_band
from torchserve.dataset import Samples, SamplesError
from torchserve.domain import domain_of
from torchserve.fitting import (
    Fitted,
    Labelled,
    MonotoneSettings,
    NetworkSettings,
    TreeSettings,
    fit_monotone,
    fit_network,
    fit_xgboost,
)
from torchserve.handler import MarginFunction, calibrated
from torchserve.label import Label
from torchserve.reference import ReferenceHistogram, reference_histograms
from torchserve.threshold import NOTHING, Cut, choose_threshold, independent, wilson
from torchserve.validity import MOST_DAYS, VALID_DAYS
from torchserve.volatility import fit_forecast

Kind = Literal["monotone", "xgboost", "torch"]
"""Trees on a few features, each of which may only help or only harm; trees on all features; a network on all."""

KINDS: Final[dict[str, Kind]] = {"champion": "monotone", "challenger": "torch"}
"""Model name → what it is. A bigger model than the champion has to beat it (`walk_forward.py`)."""


class TrainingSettings(BaseModel):
    """What training is free to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=1, ge=0, le=2**31 - 1)
    """Seed of everything random."""
    label: Label = Label()
    """What is learnt; that of the samples."""
    valid_days: float | None = Field(default=VALID_DAYS, gt=0, le=MOST_DAYS)
    """How long the model may decide after the newest market in its samples, in days; None: for ever."""
    train_fraction: float = Field(default=0.45, gt=0, lt=1)
    """Share of the time span that fits the model."""
    stopping_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the time span that says when to stop."""
    calibration_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the time span that calibrates it."""
    threshold_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the time span that sets its threshold; the rest measures it."""
    embargo_seconds: float | None = Field(default=None, ge=0)
    """Gap between two parts, beyond what the label looks ahead; None: as much again."""
    target_precision: float = Field(default=0.95, gt=0, lt=1)
    """Share of TRADE answers that shall be right."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the two-sided interval whose lower end has to reach the target."""
    minimum_coverage: float = Field(default=0.05, gt=0, lt=1)
    """Smallest share of samples a threshold must let through: the precision of fewer is chance."""
    trees: int = Field(default=200, ge=1, le=10_000)
    """Most trees."""
    epochs: int = Field(default=30, ge=1, le=1_000)
    """Most passes of the network over its samples."""
    monotone: MonotoneSettings = MonotoneSettings()
    """How trees on a few features learn."""
    xgboost: TreeSettings = TreeSettings()
    """How trees on all features learn."""
    torch: NetworkSettings = NetworkSettings()
    """How the network learns."""

    @property
    def gap_ns(self) -> int:
        """Between two parts: what the label looks ahead, and the embargo."""
        ahead = self.label.span_ns
        return ahead + (ahead if self.embargo_seconds is None else round(self.embargo_seconds * 1e9))


class Split(NamedTuple):
    """Indices into the samples: intp[n] each."""

    train: NDArray[np.intp]
    stopping: NDArray[np.intp]
    calibration: NDArray[np.intp]
    threshold: NDArray[np.intp]
    test: NDArray[np.intp]

    @property
    def between(self) -> NDArray[np.intp]:
        """All that comes after what fits and before what measures."""
        return np.concatenate([self.stopping, self.calibration, self.threshold])


@dataclass(frozen=True, slots=True)
class Metrics:
    """How a model does on one part of the samples."""

    samples: int
    independent: float
    """Independent observations that they are worth, see `threshold.py`."""
    base_rate: float
    """Share of eligible samples."""
    auc: float
    """Area under the ROC curve."""
    brier: float
    """Mean squared error of the score."""
    brier_base_rate: float
    """The same for a model that always answers the base rate."""
    precision: float | None
    """Share of eligible samples among those at or above the threshold; None without any."""
    precision_low: float | None
    """Lower end of Wilson's interval of the precision, for as many observations as are independent."""
    precision_high: float | None
    """Its upper end."""
    coverage: float
    """Share of samples at or above the threshold."""
    traded: int
    """Samples at or above the threshold."""
    traded_independent: float
    """Independent observations that those are worth."""


@dataclass(frozen=True, slots=True)
class CalibratedModel:
    """A fitted model with its calibration and threshold."""

    fitted: Fitted
    slope: float
    intercept: float
    cut: Cut
    """Its threshold, and what the threshold part says of it."""

    def scores(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[n, n_features] → float32[n], through the code that serves the model, on the bytes it will serve."""
        return calibrated(self.fitted.margin()(rows), self.slope, self.intercept)


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model with all that its archive needs."""

    name: str
    kind: Kind
    weights: bytes
    """UBJSON (XGBoost) or a Torch state dict."""
    network: dict[str, Any] | None
    """See `handler.torch_margin`; None for trees."""
    rounds: int
    """Trees, or passes over the samples, that were kept."""
    slope: float
    intercept: float
    """Calibration: score = 1 / (1 + exp(-(slope * margin + intercept)))."""
    threshold: float
    """Exactly representable as float32."""
    target_precision: float
    target_precision_reached: bool
    """Whether the threshold part has a cut that is sure to be as precise as wanted; if not, `threshold` is the one
    whose interval begins highest. That of a model that knows nothing is above every score."""
    metrics: dict[str, Metrics]
    """By part: `threshold`, which chose it, and `test`."""
    reference: dict[str, ReferenceHistogram]
    """Of the features in the part that fitted the model, and of the scores in the calibration part."""
    volatility: Forecast | None
    """Of volatility, fitted on the part that fitted the model; None where that is too short."""
    band: Band
    """Scores that are too near to the threshold, see `conformal.py`."""
    domain: dict[str, Any] | None
    """What it has seen of its features, see `domain.py`; None where it looks at none."""

    @property
    def knows_something(self) -> bool:
        """Whether its ranking told anything of the labels in the calibration part.

        A model that knows nothing gives every order the same score, and trades none.
        """
        return self.slope > 0


def split_by_time(time_ns: NDArray[np.int64], settings: TrainingSettings) -> Split:
    """Cuts the samples' time span into five parts in time order.

    Args:
        time_ns: int64[n], decision instants.
        settings: The fractions, and the gap between two parts.

    Returns:
        Parts such that every sample of one is more than the gap after every sample of the part before.

    Raises:
        SamplesError: A part is empty.
    """
    start, end = (int(time_ns.min()), int(time_ns.max())) if len(time_ns) else (0, 0)
    fractions = (
        settings.train_fraction,
        settings.stopping_fraction,
        settings.calibration_fraction,
        settings.threshold_fraction,
        1.0,
    )
    split = Split(*cut(time_ns, start, end + 1, fractions, settings.gap_ns))
    for name, part in split._asdict().items():
        if not len(part):
            raise SamplesError(f"the {name} part is empty: {len(time_ns)} samples over {(end - start) / 1e9:.1f} s")
    return split


def cut(
    time_ns: NDArray[np.int64], start_ns: int, end_ns: int, fractions: Sequence[float], gap_ns: int
) -> list[NDArray[np.intp]]:
    """Indices of the samples in [start, end), in one part for each fraction of that span.

    There is a gap before all parts but the first; what exceeds the span is cut off.
    """
    parts = []
    begin = start_ns
    for number, fraction in enumerate(fractions):
        stop = min(end_ns, begin + round((end_ns - start_ns) * fraction))
        first = begin + gap_ns if number else begin - 1
        parts.append(np.flatnonzero((time_ns > first) & (time_ns < stop)))
        begin = stop
    return parts


def train(name: str, samples: Samples, settings: TrainingSettings, kind: Kind | None = None) -> TrainedModel:
    """Fits, calibrates and measures a model. The same samples and settings give the same bytes.

    Args:
        name: The model's name in the model server, which says which replicas it is for.
        samples: In time order.
        settings: How.
        kind: The kind of model; None for the default of the name.

    Raises:
        SamplesError: Too short a time span, a part in which every label is the same, or samples of another label than
            the settings'.
    """
    kind = kind or KINDS[name]
    check_same_label(samples, settings)
    split = split_by_time(samples.time_ns, settings)
    check_labels(samples, split)
    model = fit(kind, samples, split, settings)
    scores = {
        part: model.scores(samples.rows[index])
        for part, index in (("calibration", split.calibration), ("threshold", split.threshold), ("test", split.test))
    }
    return TrainedModel(
        name=name,
        kind=kind,
        weights=model.fitted.weights,
        network=model.fitted.network,
        rounds=model.fitted.rounds,
        slope=model.slope,
        intercept=model.intercept,
        threshold=model.cut.threshold,
        target_precision=settings.target_precision,
        target_precision_reached=model.cut.reached,
        metrics={
            part: measure(scores[part], samples.take(getattr(split, part)), model.cut.threshold, settings.confidence)
            for part in ("threshold", "test")
        },
        reference=reference_histograms(
            samples.take(split.train), samples.take(split.calibration), scores["calibration"]
        ),
        volatility=fit_forecast(samples.of_mf1.take(split.train)),
        band=band_of(scores["threshold"], samples, split, model.cut, settings),
        domain=domain_of(model.fitted, samples.take(split.train), samples.take(split.between)),
    )


def band_of(scores: NDArray[np.float32], samples: Samples, split: Split, cut: Cut, settings: TrainingSettings) -> Band:
    """The band around a threshold, from the scores of the part that chose it."""
    part = samples.take(split.threshold)
    return conformal_band(scores, part, cut.threshold, confidence=settings.confidence)


def check_labels(samples: Samples, split: Split) -> None:
    """Raises SamplesError when every sample of a part has the same label."""
    for part_name, part in split._asdict().items():
        if len(np.unique(samples.eligible[part])) < 2:
            raise SamplesError(f"every sample of the {part_name} part has the same label")


def fit(kind: Kind, samples: Samples, split: Split, settings: TrainingSettings) -> CalibratedModel:
    """Fits and calibrates a model, and sets its threshold, on the first four parts of a split.

    Raises:
        SamplesError: Trees on a few features are asked for, which are of `mf1`, and the samples are of another set.
    """
    if kind == "monotone" and samples.feature_set != MF1:
        raise SamplesError(f"monotone trees look at features of {MF1.id} alone: train xgboost or torch")
    fitting, stopping = labelled(samples, split.train), labelled(samples, split.stopping)
    if kind == "monotone":
        fitted = fit_monotone(fitting, stopping, settings.monotone, trees=settings.trees, seed=settings.seed)
    elif kind == "xgboost":
        fitted = fit_xgboost(fitting, stopping, settings.xgboost, trees=settings.trees, seed=settings.seed)
    else:
        fitted = fit_network(fitting, stopping, settings.torch, epochs=settings.epochs, seed=settings.seed)
    return CalibratedModel(fitted, *calibrate(fitted.margin(), samples, split, settings))


def calibrate(
    margin: MarginFunction, samples: Samples, split: Split, settings: TrainingSettings
) -> tuple[float, float, Cut]:
    """Slope, intercept and threshold, each from samples that nothing else was made of.

    The curve is Platt's through the calibration part, the threshold is that of the threshold part.
    """
    slope, intercept = fit_platt(margin(samples.rows[split.calibration]), samples.eligible[split.calibration])
    scores = calibrated(margin(samples.rows[split.threshold]), slope, intercept)
    if slope == 0:  # it knows nothing, and must not trade everything: all scores are equal
        return slope, intercept, NOTHING._replace(threshold=float(np.nextafter(scores.max(), np.float32(2))))
    cut = choose_threshold(
        scores,
        samples.take(split.threshold),
        target_precision=settings.target_precision,
        minimum_coverage=settings.minimum_coverage,
        confidence=settings.confidence,
    )
    return slope, intercept, cut


def check_same_label(samples: Samples, settings: TrainingSettings) -> None:
    """Raises SamplesError where the samples have another label than the settings: the gaps would be wrong."""
    if samples.label != settings.label:
        raise SamplesError(f"the samples' label is {samples.label.text!r}, not {settings.label.text!r}")


def labelled(samples: Samples, index: NDArray[np.intp]) -> Labelled:
    """A part of the samples as an estimator sees it."""
    return Labelled(samples.rows[index], samples.eligible[index])


def fit_platt(margin: NDArray[np.float32], eligible: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and intercept of the logistic curve through the labels.

    The curve is fitted to targets a little inside 0 and 1, as many as one more sample of each label would make of them:
    otherwise labels that the margins separate would give an infinite slope.

    A slope below zero would turn the model's ranking round; it means that the model knows nothing, so the slope is then
    0 and every score the base rate.

    Source: J. Platt, Probabilistic Outputs for Support Vector Machines (1999).
    """
    yes, no = int(eligible.sum()), int((~eligible).sum())
    target = np.where(eligible, (yes + 1) / (yes + 2), 1 / (no + 2))
    twice = np.concatenate([margin, margin]).astype(np.float64)[:, None]
    labels = np.repeat([True, False], len(margin))
    curve = LogisticRegression(C=1e6, max_iter=1_000).fit(twice, labels, np.concatenate([target, 1 - target]))
    slope, intercept = float(curve.coef_[0, 0]), float(curve.intercept_[0])
    if slope <= 0:
        return 0.0, float(np.log((yes + 1) / (no + 1)))  # a little inside, as well
    return slope, intercept


def measure(scores: NDArray[np.float32], samples: Samples, threshold: float, confidence: float) -> Metrics:
    """Metrics of scores against labels; both labels must occur."""
    eligible = samples.eligible
    trade = scores >= np.float32(threshold)
    base_rate = float(eligible.mean())
    worth = independent(samples, trade)
    precision, low, high = None, None, None
    if trade.any():
        precision = float(eligible[trade].mean())
        low, high = (float(end) for end in wilson(precision, worth, confidence))
    return Metrics(
        samples=len(scores),
        independent=independent(samples, np.ones(len(scores), np.bool_)),
        base_rate=base_rate,
        auc=float(roc_auc_score(eligible, scores)),
        brier=float(brier_score_loss(eligible, scores)),
        brier_base_rate=base_rate * (1 - base_rate),
        precision=precision,
        precision_low=low,
        precision_high=high,
        coverage=float(trade.mean()),
        traded=int(trade.sum()),
        traded_independent=worth,
    )
