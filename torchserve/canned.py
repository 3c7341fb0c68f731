"""Rows that a model scores when it is exported. A server that loads it asks for them again and compares."""

from __future__ import annotations

import base64
from typing import Any, Final

import numpy as np

from feature_cache.features import N_FEATURES
from torchserve import handler
from torchserve.dataset import Samples
from torchserve.training import TrainedModel

_SAMPLED: Final = 14


def canned_scores(model: TrainedModel, samples: Samples) -> dict[str, Any]:
    """The entry `canned` of a model's metadata: rows (base64 of little-endian float32) and a score for each.

    The rows are some of those it was trained on, one of zeros and one without a single value.
    """
    taken = np.linspace(0, len(samples.rows) - 1, _SAMPLED).astype(np.intp)
    edges = np.array([np.zeros(N_FEATURES), np.full(N_FEATURES, np.nan)], dtype=np.float32)
    rows = np.concatenate([samples.rows[taken], edges]).astype("<f4")
    margin = (
        handler.xgboost_margin(model.weights)
        if model.network is None
        else handler.torch_margin(model.weights, model.network)
    )
    scores = handler.calibrated(margin(rows), model.slope, model.intercept)
    return {"rows": base64.b64encode(rows.tobytes()).decode(), "scores": scores.tolist()}
