"""Rows of a feature set with a label that some of their features tell of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1

Rows = NDArray[np.float32]


def labelled_rows(count: int, seed: int, feature_set: FeatureSet = MF1) -> tuple[Rows, NDArray[np.bool_]]:
    """Rows within what the set leaves possible, an eighth undefined, of large and of small numbers, with a label."""
    random = np.random.default_rng(seed)
    scale = np.where(np.isfinite(feature_set.highest), np.minimum(feature_set.highest, 100), 1e5)
    values = random.normal(size=(count, len(feature_set))) * scale / 3
    drawn = np.clip(values, feature_set.lowest, feature_set.highest).astype(np.float32)
    strength = 4 * drawn[:, 2] + 2 * (drawn[:, 0] > 20) + random.normal(size=count) * 0.5
    drawn[random.random(drawn.shape) < 0.125] = np.nan
    drawn[:, 3] = np.nan_to_num(drawn[:, 3])  # defined in all of training: libraries treat that otherwise
    return drawn, strength > 0
