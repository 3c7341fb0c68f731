"""Several models as one: the weighted mean of their scores, or a logistic regression on their margins (a stack).

The archive holds the parts whole, so it needs none of theirs. Its answer carries the score of each part beside its own
(`handler.py`), and the audit keeps them with the decision. A part may be an ensemble itself; it then counts as one.

Source: D. Wolpert, Stacked Generalization (1992).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression

from torchserve import handler, portable
from torchserve.brought.adding import Added, Adding, Servable, calibration_part, check_threshold, describe
from torchserve.brought.data import Data
from torchserve.brought.errors import BroughtError
from torchserve.fitting import Fitted

How = Literal["mean", "stack"]
_KEPT: Final = ("kind", "runtime", "network", portable.METADATA, "scored", "ensemble", "calibration")
"""Of a part's metadata: what its scores follow from."""
_ENSEMBLE: Final = "ensemble"


class Part(NamedTuple):
    """A version that is to be combined."""

    version: str
    metadata: Mapping[str, Any]
    weights: bytes
    weight: float


def combine(how: How, parts: Sequence[Part], data: Data | None, adding: Adding) -> Added:
    """Makes one model of several.

    Args:
        how: `mean` of their scores by their weights, which count by their shares; or `stack`, whose weights are fitted.
        parts: At least two.
        data: See `adding.describe`; a stack needs it.
        adding: What was decided; the feature set is the parts'.

    Raises:
        BroughtError: They do not go together, or the data say nothing of them.
        SamplesError: The data are too short.
    """
    _check(how, parts, data, adding)
    described = [
        {"version": one.version, **{key: one.metadata[key] for key in _KEPT if key in one.metadata}} for one in parts
    ]
    for one, about in zip(parts, described, strict=True):
        about["runtime"] = handler.runtime_of(one.metadata)
    weights, bias = _stacked(parts, data, adding) if how == "stack" and data else _shares(parts)
    for about, weight in zip(described, weights, strict=True):
        about["weight"] = weight
    packed = handler.packed_parts([one.weights for one in parts])
    ensemble = {"how": how, "bias": bias, "parts": described}
    scored = {"runtime": _ENSEMBLE, "network": None, "ensemble": ensemble}
    margin = handler.ensemble_margin(packed, ensemble)
    model = Servable(_ENSEMBLE, packed, scored, margin, Fitted(b"", {}, 0))
    said = ", ".join(f"{one.version} {weight:.3g}" for one, weight in zip(parts, weights, strict=True))
    return describe(model, data, adding, notes=(f"{how} of {said}",))


def _check(how: How, parts: Sequence[Part], data: Data | None, adding: Adding) -> None:
    if len(parts) < 2:
        raise BroughtError("one model is no ensemble: name two or more")
    if len(parts) > handler.MOST_PARTS:
        raise BroughtError(
            f"{len(parts)} parts: an ensemble has {handler.MOST_PARTS} at most; combine some of them first"
        )
    if len({one.version for one in parts}) < len(parts):
        raise BroughtError("a version is named twice: give it the sum of its weights instead")
    for one in parts:
        if one.metadata["feature_set_fingerprint"] != adding.feature_set.fingerprint:
            raise BroughtError(
                f"{one.version} takes the features {one.metadata['feature_set']}, not {adding.feature_set.version}: all"
                " parts must take the same"
            )
        if not 0 < one.weight < math.inf:
            raise BroughtError(f"{one.version}={one.weight:g}: a weight must be above 0, and finite")
    if how == "stack" and data is None:
        raise BroughtError("a stack is fitted: name the rows that it learns from with --calibrate")
    check_threshold(data, adding)


def _shares(parts: Sequence[Part]) -> tuple[list[float], float]:
    total = sum(one.weight for one in parts)
    return [one.weight / total for one in parts], 0.0


def _stacked(parts: Sequence[Part], data: Data, adding: Adding) -> tuple[list[float], float]:
    """Weights of the parts' margins, and the bias, on the part of the data that calibrates."""
    samples = calibration_part(data.samples, adding.training)
    margins = np.column_stack([handler.margin_of(one.metadata, one.weights)(samples.rows) for one in parts])
    # Margins of one model may be a hundred times those of another.
    scale = np.maximum(margins.std(axis=0, dtype=np.float64), 1e-12)
    fitted = LogisticRegression(C=1.0, max_iter=1_000).fit(margins / scale, samples.eligible)
    return (fitted.coef_[0] / scale).tolist(), float(fitted.intercept_[0])
