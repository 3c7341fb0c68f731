"""Fits the estimators: boosted trees on a few or on all features, a small network, and logistic regression to compare.

Trees and network stop early: they grow until the loss on samples that fit nothing has not improved for a while, and the
best state is used. All randomness follows the seed, on one thread, so that the same samples give the same bytes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
import xgboost
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from sklearn.linear_model import LogisticRegression

from feature_cache import features
from torchserve.handler import MarginFunction, standardised, torch_margin, xgboost_margin

_CLIP: Final = 8.0
"""Standardised inputs of the network are held within ±8, so that an outlier moves a score no further than that."""

_DIRECTIONS: Final[dict[str, Literal[-1, 1]]] = {
    "weighted_mid_bps": 1,
    "imbalance_l1": 1,
    "imbalance_l5": 1,
    "ofi_100ms": 1,
    "ofi_1s": 1,
    "trade_imbalance_1s": 1,
    "rv_1s_bps": -1,
    "rv_5s_bps": -1,
    "trade_rate_1s": -1,
}


class TreeSettings(BaseModel):
    """Gradient-boosted trees on all features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_depth: int = Field(default=3, ge=1, le=12)
    """Splits from root to leaf."""
    learning_rate: float = Field(default=0.05, gt=0, le=1)
    """Share of each tree's correction that is taken."""
    min_child_weight: float = Field(default=20.0, ge=0)
    """Smallest sum of p(1 - p) in a leaf, so about 80 samples or more. Neighbouring samples share most of their label's
    horizon: a leaf of a few is one observation."""
    subsample: float = Field(default=0.7, gt=0, le=1)
    """Share of the samples each tree sees."""
    colsample: float = Field(default=0.7, gt=0, le=1)
    """Share of the features each tree sees."""
    l2: float = Field(default=5.0, ge=0)
    """Penalty on the square of a leaf's value."""
    patience: int = Field(default=30, ge=1)
    """Trees without improvement after which growing stops."""


class MonotoneSettings(TreeSettings):
    """The champion: shallow trees on a few features, each of which may only raise or only lower the score.

    Which ones, and in which direction, was written down before any was measured: the book and the flow lean towards the
    order, and a market that moves a lot hurts it. What fits the noise against that direction cannot be learnt.
    """

    max_depth: int = Field(default=2, ge=1, le=12)
    """Splits from root to leaf."""
    learning_rate: float = Field(default=0.1, gt=0, le=1)
    """Share of each tree's correction that is taken."""
    colsample: float = Field(default=1.0, gt=0, le=1)
    """Share of the features each tree sees."""
    directions: dict[str, Literal[-1, 1]] = Field(default=_DIRECTIONS, min_length=1)
    """Feature → 1 where more of it may only raise the score, -1 where it may only lower it; no other is looked at."""


class NetworkSettings(BaseModel):
    """The challenger: a multilayer perceptron."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: tuple[int, ...] = (32, 16)
    """Units of the hidden layers."""
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    """Of AdamW."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Of AdamW."""
    batch: int = Field(default=512, ge=1)
    """Samples a step."""
    patience: int = Field(default=4, ge=1)
    """Epochs without improvement after which training stops."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What fitting leaves: enough to write an archive."""

    weights: bytes
    """UBJSON (XGBoost) or a Torch state dict."""
    network: dict[str, Any] | None
    """See `handler.torch_margin`; None for trees."""
    rounds: int
    """Trees, or passes over the samples, that were kept."""

    def margin(self) -> MarginFunction:
        """The function that serves these weights."""
        return xgboost_margin(self.weights) if self.network is None else torch_margin(self.weights, self.network)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Samples as an estimator sees them."""

    rows: NDArray[np.float32]
    """float32[n, n_features], NaN where undefined."""
    eligible: NDArray[np.bool_]
    """bool[n]"""


def fit_monotone(train: Labelled, stopping: Labelled, settings: MonotoneSettings, *, trees: int, seed: int) -> Fitted:
    """As `fit_xgboost`, on a few features, each in its direction. The rows that it scores hold all features."""
    seen = [features.MF1.index[name] for name in settings.directions]

    def alone(part: Labelled) -> Labelled:
        # No tree asks for a feature that is never defined.
        rows = np.full_like(part.rows, np.nan)
        rows[:, seen] = part.rows[:, seen]
        return Labelled(rows, part.eligible)

    directions = [settings.directions.get(name, 0) for name in features.MF1.names]
    return fit_xgboost(alone(train), alone(stopping), settings, trees=trees, seed=seed, directions=directions)


def fit_xgboost(
    train: Labelled,
    stopping: Labelled,
    settings: TreeSettings,
    *,
    trees: int,
    seed: int,
    directions: Sequence[int] | None = None,
) -> Fitted:
    """Grows at most `trees` trees on `train`, and keeps as many as give the least log loss on `stopping`.

    Args:
        train: Not none.
        stopping: Not none.
        settings: How.
        trees: See above.
        seed: Of which samples and features a tree sees.
        directions: For each feature 1 or -1 where the margin may only rise or only fall with it, else 0.
    """
    evaluated = xgboost.DMatrix(stopping.rows, label=stopping.eligible, nthread=1)
    booster = xgboost.train(
        {
            "objective": "binary:logistic",
            "eval_metric": "logloss",
            "tree_method": "hist",
            "max_depth": settings.max_depth,
            "eta": settings.learning_rate,
            "min_child_weight": settings.min_child_weight,
            "subsample": settings.subsample,
            "colsample_bytree": settings.colsample,
            "lambda": settings.l2,
            "seed": seed,
            "nthread": 1,
            **({"monotone_constraints": tuple(directions)} if directions is not None else {}),
        },
        xgboost.DMatrix(train.rows, label=train.eligible, nthread=1),
        num_boost_round=trees,
        evals=[(evaluated, "stopping")],
        early_stopping_rounds=settings.patience,
        verbose_eval=False,
    )
    kept = booster.best_iteration + 1
    # The best iteration is kept as an attribute, too: what is served must not depend on whether a reader heeds it.
    best = booster[:kept]
    best.set_attr(best_iteration=None, best_score=None)
    return Fitted(weights=bytes(best.save_raw(raw_format="ubj")), network=None, rounds=kept)


def fit_network(train: Labelled, stopping: Labelled, settings: NetworkSettings, *, epochs: int, seed: int) -> Fitted:
    """Trains at most `epochs` epochs on `train`, and keeps the state with the least log loss on `stopping`."""
    inputs_of = _standardising(train.rows)
    inputs, labels = _tensors(train, inputs_of)
    held_out, held_out_labels = _tensors(stopping, inputs_of)
    layers = [train.rows.shape[1], *settings.hidden, 1]
    loss = torch.nn.BCEWithLogitsLoss()
    best: tuple[float, int, bytes] | None = None
    with _deterministic_torch(seed):
        parts: list[torch.nn.Module] = []
        for width, next_width in itertools.pairwise(layers):
            parts += [torch.nn.Linear(width, next_width), torch.nn.ReLU()]
        model = torch.nn.Sequential(*parts[:-1])
        optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        for epoch in range(1, epochs + 1):
            for batch in torch.split(torch.randperm(len(inputs)), settings.batch):
                optimiser.zero_grad()
                loss(model(inputs[batch])[:, 0], labels[batch]).backward()
                optimiser.step()
            with torch.inference_mode():
                held_out_loss = float(loss(model(held_out)[:, 0], held_out_labels))
            if best is None or held_out_loss < best[0]:
                buffer = io.BytesIO()
                torch.save(model.state_dict(), buffer)
                best = held_out_loss, epoch, buffer.getvalue()
            elif epoch - best[1] >= settings.patience:
                break
    assert best is not None, "at least one epoch"
    network = {"layers": layers, "clip": _CLIP, **{name: values.tolist() for name, values in inputs_of.items()}}
    return Fitted(weights=best[2], network=network, rounds=best[1])


def fit_logistic(train: Labelled, names: Sequence[str]) -> MarginFunction:
    """Logistic regression on some features, standardised as for the network."""
    seen = [features.MF1.index[name] for name in names]
    inputs_of = _standardising(train.rows[:, seen])

    def inputs(rows: NDArray[np.float32]) -> NDArray[np.float64]:
        return standardised(rows[:, seen], **inputs_of, clip=_CLIP).astype(np.float64)

    regression = LogisticRegression(C=1.0, max_iter=1_000).fit(inputs(train.rows), train.eligible)

    def margin(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        margins: NDArray[np.float32] = regression.decision_function(inputs(rows)).astype(np.float32)
        return margins

    return margin


def _standardising(rows: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """`median`, `mean` and `scale` of each feature, as `handler.standardised` wants them."""
    # A feature that is never defined in training carries nothing: it becomes a constant.
    undefined = np.isnan(rows).all(axis=0)
    median = np.nanmedian(np.where(undefined, np.float32(0), rows), axis=0).astype(np.float32)
    filled = np.where(np.isnan(rows), median, rows)
    mean = filled.mean(axis=0, dtype=np.float64).astype(np.float32)
    deviation = filled.std(axis=0, dtype=np.float64).astype(np.float32)
    return {"median": median, "mean": mean, "scale": np.where(deviation > 0, deviation, np.float32(1))}


def _tensors(samples: Labelled, inputs_of: dict[str, NDArray[np.float32]]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = standardised(samples.rows, **inputs_of, clip=_CLIP)
    return torch.from_numpy(inputs), torch.from_numpy(samples.eligible.astype(np.float32))


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
