"""Rows that a model scores when it is exported. A server that loads it asks for them again and compares."""

from __future__ import annotations

import base64
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from torchserve import handler
from torchserve.dataset import Samples
from torchserve.fitting import Fitted
from torchserve.handler import MarginFunction
from torchserve.training import TrainedModel

_SAMPLED: Final = 14


def canned_scores(model: TrainedModel, samples: Samples) -> dict[str, Any]:
    """The entry `canned` of a model's metadata: rows (base64 of little-endian float32) and a score for each.

    The rows are some of those it was trained on, one of zeros and one without a single value.
    """
    taken = np.linspace(0, len(samples.rows) - 1, _SAMPLED).astype(np.intp)
    width = len(samples.feature_set)
    edges = np.array([np.zeros(width), np.full(width, np.nan)], dtype=np.float32)
    rows = np.concatenate([samples.rows[taken], edges]).astype("<f4")
    margin = Fitted(model.weights, model.network, model.rounds).margin()
    return canned(rows, margin, model.slope, model.intercept)


def canned(rows: NDArray[np.float32], margin: MarginFunction, slope: float, intercept: float) -> dict[str, Any]:
    """The entry for these rows, float32[n, n_features]."""
    scores = handler.calibrated(margin(rows), slope, intercept)
    return {"rows": base64.b64encode(rows.astype("<f4").tobytes()).decode(), "scores": scores.tolist()}
