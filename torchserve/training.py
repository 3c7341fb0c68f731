"""Fits, calibrates and measures the two models: the champion (XGBoost) and the challenger (a small Torch network).

Samples are split once, in time order: the first part fits the model, the second calibrates it and sets its threshold,
the third measures it. Between two parts lies a gap as long as the label looks ahead, so that no label of one part is
made of prices of the next.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
import xgboost
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from torchserve.dataset import LABEL_HORIZON_NS, Samples, SamplesError
from torchserve.handler import MarginFunction, calibrated, standardised, torch_margin, xgboost_margin

Kind = Literal["xgboost", "torch"]

KINDS: Final[dict[str, Kind]] = {"champion": "xgboost", "challenger": "torch"}
"""Model name → what it is."""

_CLIP: Final = 8.0
"""Standardised inputs of the network are held within ±8, so that an outlier moves a score no further than that."""


class TrainingSettings(BaseModel):
    """What training is free to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=1, ge=0, le=2**31 - 1)
    """Seed of everything random."""
    train_fraction: float = Field(default=0.6, gt=0, lt=1)
    """Share of the time span that fits the model."""
    calibration_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the time span that calibrates it; the rest measures it."""
    target_precision: float = Field(default=0.95, gt=0, lt=1)
    """Share of TRADE answers that shall be right."""
    minimum_coverage: float = Field(default=0.05, gt=0, lt=1)
    """Smallest share of samples a threshold must let through: the precision of fewer is chance."""
    trees: int = Field(default=80, ge=1, le=10_000)
    """Trees of the champion."""
    epochs: int = Field(default=15, ge=1, le=1_000)
    """Passes of the challenger over its samples."""


class Split(NamedTuple):
    """Indices into the samples: intp[n] each."""

    train: NDArray[np.intp]
    calibration: NDArray[np.intp]
    test: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Metrics:
    """How a model does on one part of the samples."""

    samples: int
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
    coverage: float
    """Share of samples at or above the threshold."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model with all that its archive needs."""

    name: str
    kind: Kind
    weights: bytes
    """UBJSON (XGBoost) or a Torch state dict."""
    network: dict[str, Any] | None
    """See `handler.torch_margin`; None for XGBoost."""
    slope: float
    intercept: float
    """Calibration: score = 1 / (1 + exp(-(slope * margin + intercept)))."""
    threshold: float
    """Exactly representable as float32."""
    target_precision: float
    target_precision_reached: bool
    """Whether the calibration part has a threshold with the target precision; if not, `threshold` is the one with the
    best precision it has."""
    metrics: dict[str, Metrics]
    """By part: `calibration`, `test`."""


def split_by_time(time_ns: NDArray[np.int64], settings: TrainingSettings) -> Split:
    """Cuts the samples' time span into three parts in time order.

    Args:
        time_ns: int64[n], decision instants.
        settings: The fractions.

    Returns:
        Parts such that every sample of one is more than the label's horizon after every sample of the part before.

    Raises:
        SamplesError: A part is empty.
    """
    start, end = (int(time_ns.min()), int(time_ns.max())) if len(time_ns) else (0, 0)
    first = start + int((end - start) * settings.train_fraction)
    second = start + int((end - start) * (settings.train_fraction + settings.calibration_fraction))
    split = Split(
        train=np.flatnonzero(time_ns < first),
        calibration=np.flatnonzero((time_ns > first + LABEL_HORIZON_NS) & (time_ns < second)),
        test=np.flatnonzero(time_ns > second + LABEL_HORIZON_NS),
    )
    for name, part in split._asdict().items():
        if not len(part):
            raise SamplesError(f"the {name} part is empty: {len(time_ns)} samples over {(end - start) / 1e9:.1f} s")
    return split


def train(name: str, samples: Samples, settings: TrainingSettings) -> TrainedModel:
    """Fits, calibrates and measures the model of this name. The same samples and settings give the same bytes.

    Raises:
        SamplesError: Too short a time span, or a part in which every label is the same.
    """
    split = split_by_time(samples.time_ns, settings)
    for part_name, part in split._asdict().items():
        if len(np.unique(samples.eligible[part])) < 2:
            raise SamplesError(f"every sample of the {part_name} part has the same label")
    kind = KINDS[name]
    rows, eligible = samples.rows[split.train], samples.eligible[split.train]
    margin: MarginFunction
    network: dict[str, Any] | None
    if kind == "xgboost":
        weights, network = _fit_xgboost(rows, eligible, settings), None
        margin = xgboost_margin(weights)
    else:
        weights, network = _fit_network(rows, eligible, settings)
        margin = torch_margin(weights, network)

    # Calibrated and measured through the code that serves the model, on the bytes it will serve.
    margins = {part: margin(samples.rows[getattr(split, part)]) for part in ("calibration", "test")}
    labels = {part: samples.eligible[getattr(split, part)] for part in margins}
    slope, intercept = fit_platt(margins["calibration"], labels["calibration"])
    scores = {part: calibrated(values, slope, intercept) for part, values in margins.items()}
    threshold, reached = choose_threshold(scores["calibration"], labels["calibration"], settings)
    return TrainedModel(
        name=name,
        kind=kind,
        weights=weights,
        network=network,
        slope=slope,
        intercept=intercept,
        threshold=threshold,
        target_precision=settings.target_precision,
        target_precision_reached=reached,
        metrics={part: measure(scores[part], labels[part], threshold) for part in scores},
    )


def fit_platt(margin: NDArray[np.float32], eligible: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and intercept of the logistic curve through the labels.

    A slope below zero would turn the model's ranking round; it means that the model knows nothing, so the slope is then
    0 and every score the base rate.

    Source: J. Platt, Probabilistic Outputs for Support Vector Machines (1999).
    """
    curve = LogisticRegression(C=1e6, max_iter=1_000).fit(margin.astype(np.float64)[:, None], eligible)
    slope, intercept = float(curve.coef_[0, 0]), float(curve.intercept_[0])
    if slope <= 0:
        base_rate = float(eligible.mean())
        return 0.0, float(np.log(base_rate / (1 - base_rate)))
    return slope, intercept


def choose_threshold(
    scores: NDArray[np.float32], eligible: NDArray[np.bool_], settings: TrainingSettings
) -> tuple[float, bool]:
    """The lowest threshold that reaches the target precision; if none does, the one with the best precision.

    Only thresholds that let at least the minimum coverage through are looked at.

    Returns:
        The threshold (`score >= threshold` trades) and whether the target is reached.
    """
    order = np.argsort(-scores, kind="stable")
    descending = scores[order]
    passed = np.arange(1, len(scores) + 1)
    precision = np.cumsum(eligible[order]) / passed
    # Equal scores pass together: only the last of them is a place to cut.
    last_of_equal = np.append(descending[1:] != descending[:-1], True)
    allowed = np.flatnonzero(last_of_equal & (passed >= settings.minimum_coverage * len(scores)))
    reaching = allowed[precision[allowed] >= settings.target_precision]
    if len(reaching):
        return float(descending[reaching[-1]]), True
    # The last of equally precise cuts has the most coverage.
    best = allowed[np.flatnonzero(precision[allowed] == precision[allowed].max())[-1]]
    return float(descending[best]), False


def measure(scores: NDArray[np.float32], eligible: NDArray[np.bool_], threshold: float) -> Metrics:
    """Metrics of scores against labels; both labels must occur."""
    trade = scores >= np.float32(threshold)
    base_rate = float(eligible.mean())
    return Metrics(
        samples=len(scores),
        base_rate=base_rate,
        auc=float(roc_auc_score(eligible, scores)),
        brier=float(brier_score_loss(eligible, scores)),
        brier_base_rate=base_rate * (1 - base_rate),
        precision=float(eligible[trade].mean()) if trade.any() else None,
        coverage=float(trade.mean()),
    )


def _fit_xgboost(rows: NDArray[np.float32], eligible: NDArray[np.bool_], settings: TrainingSettings) -> bytes:
    booster = xgboost.train(
        {
            "objective": "binary:logistic",
            "tree_method": "hist",
            "max_depth": 3,
            "eta": 0.05,
            # Neighbouring samples share most of their label's horizon: a leaf of a few is one observation.
            "min_child_weight": 100,
            "subsample": 0.7,
            "colsample_bytree": 0.7,
            "lambda": 5.0,
            "seed": settings.seed,
            "nthread": 1,
        },
        xgboost.DMatrix(rows, label=eligible, nthread=1),
        num_boost_round=settings.trees,
    )
    return bytes(booster.save_raw(raw_format="ubj"))


def _fit_network(
    rows: NDArray[np.float32], eligible: NDArray[np.bool_], settings: TrainingSettings
) -> tuple[bytes, dict[str, Any]]:
    # A feature that is never defined in training carries nothing: it becomes a constant.
    undefined = np.isnan(rows).all(axis=0)
    median = np.nanmedian(np.where(undefined, np.float32(0), rows), axis=0).astype(np.float32)
    filled = np.where(np.isnan(rows), median, rows)
    mean = filled.mean(axis=0, dtype=np.float64).astype(np.float32)
    deviation = filled.std(axis=0, dtype=np.float64).astype(np.float32)
    scale = np.where(deviation > 0, deviation, np.float32(1))
    inputs = torch.from_numpy(standardised(rows, median, mean, scale, _CLIP))
    labels = torch.from_numpy(eligible.astype(np.float32))
    layers = [rows.shape[1], 32, 16, 1]
    with _deterministic_torch(settings.seed):
        parts: list[torch.nn.Module] = []
        for width, next_width in itertools.pairwise(layers):
            parts += [torch.nn.Linear(width, next_width), torch.nn.ReLU()]
        model = torch.nn.Sequential(*parts[:-1])
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        loss = torch.nn.BCEWithLogitsLoss()
        for _ in range(settings.epochs):
            for batch in torch.split(torch.randperm(len(inputs)), 512):
                optimiser.zero_grad()
                loss(model(inputs[batch])[:, 0], labels[batch]).backward()
                optimiser.step()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
    network = {
        "layers": layers,
        "median": median.tolist(),
        "mean": mean.tolist(),
        "scale": scale.tolist(),
        "clip": _CLIP,
    }
    return buffer.getvalue(), network


@contextmanager
def _deterministic_torch(seed: int) -> Iterator[None]:
    """One thread and a fixed seed inside; the process's own state again outside."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
