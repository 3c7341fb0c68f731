"""Models of LightGBM and scikit-learn as ONNX, by their converters (extra `byom`)."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_cache.feature_set import FeatureSet
from torchserve.brought.columns import check_names, check_width
from torchserve.brought.errors import BroughtError

_INPUT: Final = "input"
_PROBABILITIES: Final = "probabilities"
_UNNAMED: Final = re.compile(r"Column_\d+")


@dataclass(frozen=True, slots=True)
class Converted:
    """A model in ONNX, and in its own library."""

    onnx: bytes
    output: str
    """Name of the output with the probabilities of both classes."""
    original: Any
    """See `reading.Scores`."""


def lightgbm_model(content: bytes, feature_set: FeatureSet) -> Converted:
    """A booster that was saved as text.

    Raises:
        BroughtError: It cannot be read or converted, or is of another objective or other features.
    """
    import lightgbm  # noqa: PLC0415 - only this kind needs it
    from onnxmltools import convert_lightgbm  # noqa: PLC0415
    from onnxmltools.convert.common.data_types import FloatTensorType  # noqa: PLC0415

    try:
        booster = lightgbm.Booster(model_str=content.decode())
    except (lightgbm.basic.LightGBMError, UnicodeDecodeError) as error:
        raise BroughtError(
            "LightGBM cannot read it: save it with `booster.save_model('model.txt')`, of a classifier `booster_`"
        ) from error
    check_width(booster.num_feature(), feature_set)
    names = booster.feature_name()
    check_names(None if all(map(_UNNAMED.fullmatch, names)) else names, feature_set)
    objective = re.search(r"(?m)^objective=(\S+)", content.decode())
    if objective is None or objective[1] != "binary":
        raise BroughtError(f"its objective is {objective[1] if objective else 'its own'}: train it with binary")

    def original(rows: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.asarray(booster.predict(rows, num_threads=1), dtype=np.float64)

    with _quiet():
        converted = convert_lightgbm(
            booster, initial_types=[(_INPUT, FloatTensorType([None, len(feature_set)]))], zipmap=False
        )
    return Converted(converted.SerializeToString(), _PROBABILITIES, original)


def sklearn_model(content: bytes, feature_set: FeatureSet) -> Converted:
    """A classifier that was pickled, by itself or by joblib. Unpickling runs what the file says.

    Raises:
        BroughtError: It cannot be read or converted, or is no classifier of two classes of these features.
    """
    import joblib  # noqa: PLC0415 - only this kind needs it
    from skl2onnx import to_onnx  # noqa: PLC0415
    from skl2onnx.common.data_types import FloatTensorType  # noqa: PLC0415

    try:
        with _quiet():
            model = joblib.load(io.BytesIO(content))
    except Exception as error:  # whatever a pickle raises
        raise BroughtError(f"it cannot be unpickled here: {error!r}: save it with joblib.dump") from error
    _check_classifier(model)
    check_width(int(model.n_features_in_), feature_set)
    check_names(getattr(model, "feature_names_in_", None), feature_set)

    def original(rows: NDArray[np.float32]) -> NDArray[np.float64]:
        with _quiet():
            return np.asarray(model.predict_proba(rows)[:, 1], dtype=np.float64)

    try:
        with _quiet():
            converted = to_onnx(
                model,
                initial_types=[(_INPUT, FloatTensorType([None, len(feature_set)]))],
                options={"zipmap": False},
            )
    except Exception as error:  # of classes that the converter does not name
        said = str(error.__cause__ or error).strip().splitlines()[0][:200]
        raise BroughtError(
            f"skl2onnx cannot convert a {type(model).__name__} ({said}): take an estimator that it supports, or export"
            " it as ONNX yourself"
        ) from error
    return Converted(converted.SerializeToString(), _PROBABILITIES, original)


def _check_classifier(model: Any) -> None:
    classes: Sequence[Any] | None = getattr(model, "classes_", None)
    if not hasattr(model, "predict_proba") or classes is None:
        raise BroughtError(
            f"a {type(model).__name__} gives no probabilities: fit a classifier with `predict_proba`, for example"
            " CalibratedClassifierCV around it"
        )
    if len(classes) != 2:
        raise BroughtError(f"it knows {len(classes)} classes: fit it on a label of 0 and 1")


@contextmanager
def _quiet() -> Iterator[None]:
    """Converters warn of what concerns their authors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
