"""What an archive says of a brought model: calibration, threshold, band, domain, references, canned rows.

The rows are split in time order into three parts: the first calibrates, the second chooses the threshold and the band,
the third measures. None of them may have trained the model, which nobody can check here. Between two parts is a gap as
in training (`training.py`). Without rows the model's own probabilities are the scores, the threshold is the caller's,
and all that needs rows is missing; `lacks` says what.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from feature_cache import har
from feature_cache.feature_set import FeatureSet
from torchserve.brought.data import Data
from torchserve.brought.errors import BroughtError
from torchserve.brought.reading import Brought, check_undefined, probe_rows, prove
from torchserve.canned import canned
from torchserve.conformal import conformal_band
from torchserve.dataset import Samples
from torchserve.domain import domain_of
from torchserve.fitting import Fitted
from torchserve.handler import MarginFunction, calibrated
from torchserve.reference import SCORE, reference_histogram
from torchserve.threshold import Cut
from torchserve.training import Metrics, Split, TrainingSettings, calibrate, cut, measure
from torchserve.validity import expires_at

_PARTS: Final = (0.4, 0.35, 1.0)
"""Shares of the time span: calibration, threshold, and the rest for the test."""
_PART_NAMES: Final = ("calibration", "threshold", "test")
_CANNED: Final = 14
_BACKGROUND: Final = 32
"""Rows that explanations start from."""
_LIBRARIES: Final = ("numpy", "onnxruntime", "torch", "xgboost-cpu", "lightgbm", "scikit-learn")
_NO_TIME: Final = "drift and OUT_OF_DOMAIN: the dataset has no column `time`"
_NO_DATA: Final = (
    "calibration: its own probabilities are the scores",
    "drift, OUT_OF_DOMAIN, UNCERTAIN and explanations: there is no dataset",
    "a date after which it must not decide",
)


class Adding(NamedTuple):
    """What whoever adds a model decides."""

    feature_set: FeatureSet
    name: str = "champion"
    """Whose place it is for."""
    threshold: float | None = None
    """None to choose it from the dataset."""
    fill_undefined: bool = False
    """Whether undefined features become the dataset's median."""
    training: TrainingSettings = TrainingSettings()
    """Target, confidence and coverage of the threshold, and for how long it may decide."""


@dataclass(frozen=True, slots=True)
class Added:
    """A model that is ready to be written."""

    name: str
    weights: bytes
    metadata: dict[str, Any]
    difference: float
    """Largest one between its scores and those of the original library."""
    lacks: tuple[str, ...]
    """What does not work with it, and why; for people."""
    notes: tuple[str, ...]
    """What was decided about it, for people."""
    metrics: Mapping[str, Metrics]
    """By part; empty without a dataset."""


def add(brought: Brought, data: Data | None, adding: Adding) -> Added:
    """Checks, calibrates and describes a brought model.

    Raises:
        BroughtError: It cannot be served, or its data say nothing of it.
        SamplesError: The data are too short for three parts.
    """
    feature_set = adding.feature_set
    check_threshold(data, adding)
    if adding.fill_undefined:
        if data is None:
            raise BroughtError("--fill-undefined takes the medians of a dataset: name one with --calibrate")
        brought = brought.filling(medians(data.samples.rows))
    check_undefined(brought, feature_set)
    rows = probe_rows(feature_set, 5_000) if data is None else data.samples.rows
    if data is not None:
        taken = np.linspace(0, len(rows) - 1, 4_000).astype(np.intp)
        rows = np.concatenate([rows[taken], probe_rows(feature_set, 1_000)])
    difference = prove(brought, rows)
    is_trees = brought.scored["runtime"] == "xgboost"
    seen_by = Fitted(brought.weights, None if is_trees else {}, 0)
    model = Servable(brought.kind, brought.weights, brought.scored, brought.margin(), seen_by)
    return describe(model, data, adding, notes=brought.notes, difference=difference)


def check_threshold(data: Data | None, adding: Adding) -> None:
    """Raises BroughtError where the threshold is missing, or no probability."""
    if data is None and adding.threshold is None:
        raise BroughtError("without a dataset the threshold is yours to say: --threshold, or --calibrate DATASET")
    if adding.threshold is not None and not 0 <= adding.threshold <= 1:
        raise BroughtError(f"--threshold {adding.threshold:g}: must be from 0 to 1, a probability")


class Servable(NamedTuple):
    """A model as it will be served, before anything is known of its scores."""

    kind: str
    weights: bytes
    scored: Mapping[str, Any]
    """`runtime`, `network` and what the runtime needs, for the metadata."""
    margin: MarginFunction
    seen_by: Fitted
    """For the domain: which features it reads."""


def describe(
    model: Servable, data: Data | None, adding: Adding, *, notes: tuple[str, ...] = (), difference: float = 0.0
) -> Added:
    """Calibrates a model, and writes down all that an archive says of it.

    Args:
        model: The model.
        data: Rows that have not trained it.
        adding: What was decided.
        notes: For people.
        difference: See `Added`.

    Raises:
        BroughtError: The data say nothing of it.
        SamplesError: They are too short for three parts.
    """
    learnt = _Learnt.nothing(adding) if data is None else _Learnt.of(model, data, adding)
    slope, intercept, cut_ = learnt.slope, learnt.intercept, learnt.cut
    rows = probe_rows(adding.feature_set, _CANNED + 2, seed=3)
    if data is not None:
        given = data.samples.rows
        rows = np.concatenate([given[np.linspace(0, len(given) - 1, _CANNED).astype(np.intp)], rows[:2]])
    metadata = {
        "name": adding.name,
        "kind": model.kind,
        "brought": True,
        **model.scored,
        "feature_set": adding.feature_set.id,
        "feature_set_fingerprint": adding.feature_set.fingerprint,
        "feature_names": list(adding.feature_set.names),
        "label": (adding.training.label if data is None else data.samples.label).described,
        "threshold": cut_.threshold,
        "target_precision": adding.training.target_precision,
        "target_precision_reached": cut_.reached,
        "calibration": {"slope": slope, "intercept": intercept},
        "canned": canned(rows, model.margin, slope, intercept),
        "expires_at": learnt.expires_at,
        "background": base64.b64encode(learnt.background.astype("<f4").tobytes()).decode(),
        har.METADATA: None,
        "libraries": dict(_installed()),
        **learnt.metadata,
    }
    return Added(
        adding.name, model.weights, metadata, difference, learnt.lacks, (*notes, *learnt.notes), learnt.metrics
    )


class _Learnt(NamedTuple):
    """What rows with labels say of a model."""

    slope: float
    intercept: float
    cut: Cut
    expires_at: int
    background: NDArray[np.float32]
    metadata: Mapping[str, Any]
    metrics: Mapping[str, Metrics]
    lacks: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def nothing(cls, adding: Adding) -> _Learnt:
        """Without rows."""
        assert adding.threshold is not None
        empty = np.empty((0, len(adding.feature_set)), dtype=np.float32)
        cut_ = _given(adding.threshold)
        return cls(1.0, 0.0, cut_, 0, empty, {"metrics": {}}, {}, _NO_DATA, ())

    @classmethod
    def of(cls, model: Servable, data: Data, adding: Adding) -> _Learnt:
        """From rows; see the module."""
        samples = data.samples
        settings = adding.training.model_copy(update={"label": samples.label})
        split = _split(samples, settings)
        slope, intercept, chosen = calibrate(model.margin, samples, split, settings)
        if slope == 0:
            raise BroughtError(
                "its scores say nothing of the label in the dataset: 1 must mean that the order was right to send, and"
                " the score must rise with that"
            )
        cut_ = chosen if adding.threshold is None else _given(adding.threshold)
        scores = calibrated(model.margin(samples.rows), slope, intercept)
        parts = {name: getattr(split, name) for name in _PART_NAMES}
        metrics = {
            name: measure(scores[part], samples.take(part), cut_.threshold, settings.confidence)
            for name, part in parts.items()
        }
        band = conformal_band(
            scores[split.threshold], samples.take(split.threshold), cut_.threshold, confidence=settings.confidence
        )
        metadata: dict[str, Any] = {
            "metrics": {name: asdict(one) for name, one in metrics.items()},
            "band": band.described,
            "data": {
                "source": samples.source,
                "source_sha256": samples.source_sha256,
                "samples": len(samples.rows),
                "sha256": samples.sha256(),
            },
        }
        lacks: list[str] = []
        if data.has_time:
            metadata["trained_until"] = samples.until
            metadata["reference"] = _references(data, split, scores, adding.feature_set)
            calibration, chose = samples.take(split.calibration), samples.take(split.threshold)
            metadata["domain"] = domain_of(model.seen_by, calibration, chose, data.step_seconds)
        else:
            lacks.append(_NO_TIME)
        notes = []
        if adding.threshold is None and not cut_.reached:
            notes.append(
                f"no threshold is sure to reach a precision of {settings.target_precision:g}: the surest is taken,"
                f" {cut_.precision:.3f} (at least {cut_.low:.3f}) at a coverage of {cut_.coverage:.2f}"
            )
        undefined = np.isnan(samples.rows).all(axis=0)
        if undefined.any():
            names = ", ".join(np.array(adding.feature_set.names)[undefined].tolist())
            notes.append(
                f"undefined in every row of the dataset, so that nothing is known of the model with a value: {names}"
            )
        if not data.has_time:
            notes.append("each row counts as independent of all others, as the dataset has no column `time`")
        return cls(
            slope,
            intercept,
            cut_,
            expires_at(samples, settings.valid_days) if data.has_time else 0,
            samples.rows[split.calibration][:: max(1, len(split.calibration) // _BACKGROUND)][:_BACKGROUND],
            metadata,
            metrics,
            tuple(lacks),
            tuple(notes),
        )


def medians(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each feature; 0 for one that is never defined."""
    undefined = np.isnan(rows).all(axis=0)
    found: NDArray[np.float32] = np.nanmedian(np.where(undefined, np.float32(0), rows), axis=0).astype(np.float32)
    return found


def _given(threshold: float) -> Cut:
    """A threshold that nothing was looked at for."""
    return Cut(float(np.float32(threshold)), 0.0, 0.0, 0.0, 0, 0.0, reached=False)


def calibration_part(samples: Samples, settings: TrainingSettings) -> Samples:
    """What calibrates a model.

    Raises:
        BroughtError: A part of the samples does not hold both labels.
    """
    return samples.take(_split(samples, settings.model_copy(update={"label": samples.label})).calibration)


def _split(samples: Samples, settings: TrainingSettings) -> Split:
    """Calibration, threshold and test; what would fit and stop a model is empty."""
    start, end = int(samples.time_ns.min()), int(samples.time_ns.max())
    parts = cut(samples.time_ns, start, end + 1, _PARTS, settings.gap_ns)
    for name, part in zip(_PART_NAMES, parts, strict=True):
        if len(np.unique(samples.eligible[part])) < 2:
            raise BroughtError(
                f"the {name} part of the dataset ({len(part)} of {len(samples.rows)} rows, {(end - start) / 1e9:.0f} s"
                " in all) does not hold both labels: bring more rows, or a longer time"
            )
    nothing = np.empty(0, dtype=np.intp)
    return Split(nothing, nothing, *parts)


def _references(
    data: Data, split: Split, scores: NDArray[np.float32], feature_set: FeatureSet
) -> dict[str, dict[str, Any]]:
    """Histograms of the features before the test part, and of the scores where they were calibrated."""
    before = data.samples.take(split.between)
    calibration = data.samples.take(split.calibration)
    found = {
        name: asdict(reference_histogram(before.rows[:, place], before, data.step_seconds))
        for name, place in feature_set.index.items()
    }
    return found | {SCORE: asdict(reference_histogram(scores[split.calibration], calibration, data.step_seconds))}


def _installed() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            yield name, installed_version(name)
