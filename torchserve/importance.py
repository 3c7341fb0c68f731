"""The importance of each feature for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from torchserve.handler import MarginFunction, torch_margin

SHAP: Final = "mean absolute SHAP value, in log odds (TreeSHAP of XGBoost)"
PERMUTATION: Final = "loss of AUC when the feature's values are shuffled"


def importance_of(
    described: Mapping[str, Any], weights: bytes, rows: NDArray[np.float32], eligible: NDArray[np.bool_]
) -> tuple[dict[str, float], str]:
    """Feature → importance, the largest first, and what that number is.

    Args:
        described: A model's metadata.
        weights: Its weights.
        rows: float32[n, n_features], samples that it was not fitted on.
        eligible: bool[n], their labels, both of which occur.
    """
    names = described["feature_names"]
    if described["network"] is None:
        return _ranked(names, shap_importance(weights, rows)), SHAP
    margin = torch_margin(weights, described["network"])
    seed = described["training"]["seed"]
    return _ranked(names, permutation_importance(margin, rows, eligible, seed)), PERMUTATION


def shap_importance(weights: bytes, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64[n_features]: mean absolute contribution to the margin of a boosted tree ensemble.

    Source: Lundberg et al., From local explanations to global understanding with explainable AI for trees (2020).
    """
    import xgboost  # noqa: PLC0415 - only this model needs it

    booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(weights))
    contributions = booster.predict(xgboost.DMatrix(rows, nthread=1), pred_contribs=True)
    found: NDArray[np.float64] = np.abs(contributions[:, :-1]).mean(axis=0, dtype=np.float64)
    return found


def permutation_importance(
    margin: MarginFunction, rows: NDArray[np.float32], eligible: NDArray[np.bool_], seed: int
) -> NDArray[np.float64]:
    """float64[n_features]: how much AUC is lost without each; both labels must occur.

    Source: L. Breiman, Random Forests (2001).
    """
    random = np.random.default_rng(seed)
    whole = roc_auc_score(eligible, margin(rows))
    lost = np.empty(rows.shape[1])
    for column in range(rows.shape[1]):
        shuffled = rows.copy()
        random.shuffle(shuffled[:, column])
        lost[column] = whole - roc_auc_score(eligible, margin(shuffled))
    return lost


def _ranked(names: Sequence[str], values: NDArray[np.float64]) -> dict[str, float]:
    """By feature, the largest first."""
    order = np.argsort(-values, kind="stable")
    return {names[i]: float(values[i]) for i in order}
