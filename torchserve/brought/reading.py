"""Reads a model that was trained elsewhere, and says how it is scored here.

========================  ==================================================================================
kind                      what becomes of it
========================  ==================================================================================
`onnx`                    kept as it is, scored by ONNX Runtime
`xgboost`                 kept as UBJSON, scored by XGBoost itself
`lightgbm`, `sklearn`     converted to ONNX (`converting.py`), scored by ONNX Runtime
`torchscript`             kept as it is, scored by Torch: an export to ONNX follows only what a tracer sees of it
========================  ==================================================================================

Whatever is converted is held against the original library on some 10,000 rows, undefined values among them, before it
is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from feature_cache.feature_set import FeatureSet
from torchserve import handler
from torchserve.brought.columns import check_names, check_width
from torchserve.brought.errors import BroughtError

Kind = Literal["onnx", "xgboost", "lightgbm", "sklearn", "torchscript"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
Output = Literal["margin", "probability"]

Scores = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""float32[n, n_features] → float64[n]: probabilities by the library that the model comes from."""

TOLERANCE: Final = 1e-6
"""Of a score, between what is served and the original library."""
_PROVEN: Final = 10_000
"""Rows that a conversion is held against the original on."""
_SHARES_SUM: Final = 1e-4
_NEAR_NUMBER: Final = 1e-9
_XGBOOST_OBJECTIVES: Final = ("binary:logistic", "binary:logitraw", "reg:logistic")


@dataclass(frozen=True, slots=True)
class Brought:
    """A model as it will be scored."""

    kind: Kind
    weights: bytes
    scored: Mapping[str, Any]
    """`runtime`, `network` and `scored` of the metadata."""
    original: Scores | None = None
    """The library that the model comes from; None where that is what serves it."""
    notes: tuple[str, ...] = field(default=())
    """What was decided about it, for people."""

    def margin(self) -> handler.MarginFunction:
        """The function that will serve it."""
        return handler.margin_of(self.scored, self.weights)

    def filling(self, values: NDArray[np.float32]) -> Brought:
        """The same with these values, one a feature, where a row is undefined."""
        if self.scored["runtime"] == "xgboost":
            raise BroughtError("XGBoost has its own way with undefined values: leave --fill-undefined out")
        scored = {**self.scored["scored"], "fill": values.astype(float).tolist()}
        return replace(self, scored={**self.scored, "scored": scored})


def read_model(
    path: Path, kind: Kind, feature_set: FeatureSet, *, output: str = "", output_is: Output | None = None
) -> Brought:
    """Reads a model file.

    Args:
        path: The file.
        kind: What made it.
        feature_set: What its rows hold.
        output: Name of the output that is the score, of a model in ONNX that has several.
        output_is: What one column of output is; None to go by its values.

    Raises:
        BroughtError: It cannot be read, takes other rows, or gives something else than one score for each.
        ModuleNotFoundError: The library that it needs is not installed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BroughtError(f"{path} cannot be read: {error.strerror}") from error
    if kind == "xgboost":
        return _xgboost(content, feature_set)
    if kind == "torchscript":
        return _torchscript(content, feature_set, output_is)
    if kind == "onnx":
        return _onnx(content, feature_set, output, output_is)
    from torchserve.brought import converting  # noqa: PLC0415 - two libraries that only this needs

    given = converting.lightgbm_model if kind == "lightgbm" else converting.sklearn_model
    converted = given(content, feature_set)
    return replace(
        _onnx(converted.onnx, feature_set, converted.output, "probability"), kind=kind, original=converted.original
    )


def probe_rows(feature_set: FeatureSet, count: int, seed: int = 1) -> NDArray[np.float32]:
    """Rows of all magnitudes within what the set leaves possible, a tenth undefined; the first two are 0 and NaN."""
    random = np.random.default_rng(seed)
    size = (count, len(feature_set))
    values = random.choice([-1.0, 1.0], size) * 10.0 ** random.uniform(-3, 6, size)
    whole = random.random(size) < 0.3
    values[whole] = random.integers(-3, 4, size)[whole]
    rows = np.clip(values, feature_set.lowest, feature_set.highest).astype(np.float32)
    rows[random.random(size) < 0.1] = np.nan
    rows[:2] = [[0.0], [np.nan]]
    return rows


def check_undefined(brought: Brought, feature_set: FeatureSet) -> None:
    """Raises BroughtError where the model gives no score for a row with undefined features."""
    rows = np.zeros((len(feature_set) + 1, len(feature_set)), dtype=np.float32)
    rows[np.arange(len(feature_set)), np.arange(len(feature_set))] = np.nan
    rows[-1] = np.nan
    if not np.isfinite(brought.margin()(np.zeros((1, len(feature_set)), dtype=np.float32))).all():
        raise BroughtError("the model gives no finite score for a row of zeros, in which nothing is undefined")
    without = np.flatnonzero(~np.isfinite(brought.margin()(rows)))
    if len(without):
        name = "any" if without[0] == len(feature_set) else repr(feature_set.names[without[0]])
        raise BroughtError(
            f"the model gives no score where {name} is undefined (NaN), as it is at the start of a market: put an"
            " imputer in front of it, or add it with --fill-undefined and a dataset"
        )


def prove(brought: Brought, rows: NDArray[np.float32]) -> float:
    """Holds what is served against the original library, on these rows and on some with more undefined values.

    Returns:
        The largest difference of a score; 0 where the original is what is served.

    Raises:
        BroughtError: It is more than `TOLERANCE`.
    """
    if brought.original is None:
        return 0.0
    random = np.random.default_rng(2)
    proven = np.concatenate([rows, rows])[:_PROVEN].copy()
    proven[len(proven) // 2 :][random.random(proven[len(proven) // 2 :].shape) < 0.2] = np.nan
    served = handler.calibrated(brought.margin()(proven), 1.0, 0.0)
    difference = np.abs(served - brought.original(handler.filled(proven, brought.scored["scored"])))
    worst = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
    if difference[worst] <= TOLERANCE:
        return float(difference[worst])
    undefined = np.isnan(proven).any(axis=1)
    only_there = undefined[~(difference <= TOLERANCE)].all()
    raise BroughtError(
        f"converted to ONNX its scores differ by up to {difference[worst]:.2g} from those of {brought.kind}"
        + (
            ", on rows with undefined features (NaN) only: put an imputer in front of the model, or add it with"
            " --fill-undefined and a dataset"
            if only_there
            else ": export it as ONNX yourself, and add that with --kind onnx"
        )
    )


def _xgboost(content: bytes, feature_set: FeatureSet) -> Brought:
    import json  # noqa: PLC0415

    import xgboost  # noqa: PLC0415 - only this kind needs it

    try:
        booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(content))
    except xgboost.core.XGBoostError as error:
        raise BroughtError(
            "XGBoost cannot read it: save it with `booster.save_model('model.ubj')`, not with pickle"
        ) from error
    check_width(booster.num_features(), feature_set)
    check_names(booster.feature_names, feature_set)
    objective = json.loads(booster.save_config())["learner"]["objective"]["name"]
    if objective not in _XGBOOST_OBJECTIVES:
        raise BroughtError(f"its objective is {objective}: train it with {' or '.join(_XGBOOST_OBJECTIVES)}")
    notes: tuple[str, ...] = ()
    best = booster.attr("best_iteration")
    if best is not None:
        # The best iteration is an attribute that only some readers heed.
        booster = booster[: int(best) + 1]
        booster.set_attr(best_iteration=None, best_score=None)
        notes = (f"of its trees those up to the best iteration, {best}, are kept, as XGBClassifier predicts",)
    booster.feature_names = booster.feature_types = None  # they were looked at; from here on places count
    weights = bytes(booster.save_raw(raw_format="ubj"))
    return Brought("xgboost", weights, {"runtime": "xgboost", "network": None}, notes=notes)


def _torchscript(content: bytes, feature_set: FeatureSet, output_is: Output | None) -> Brought:
    import torch  # noqa: PLC0415 - only this kind needs it

    try:
        model = handler.torchscript(content, "cpu")
    except (RuntimeError, ValueError) as error:
        raise BroughtError(
            "Torch cannot read it as TorchScript: save it with `torch.jit.script(model).save(FILE)`, or trace it"
        ) from error
    rows = np.nan_to_num(probe_rows(feature_set, 64))
    try:
        with torch.inference_mode():
            given = model(torch.from_numpy(rows))
    except RuntimeError as error:
        raise BroughtError(
            f"it does not take float32[rows, {len(feature_set)}]: {str(error).strip().splitlines()[-1]}"
        ) from error
    if not isinstance(given, torch.Tensor):
        raise BroughtError(f"it returns a {type(given).__name__}: let its `forward` return one tensor, the scores")
    scored, notes = _reading(given.numpy(), rows, output_is)
    return Brought("torchscript", content, {"runtime": "torchscript", "network": None, "scored": scored}, notes=notes)


def _onnx(content: bytes, feature_set: FeatureSet, output: str, output_is: Output | None) -> Brought:
    import onnxruntime  # noqa: PLC0415 - only this kind needs it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of classes that the library does not name
        said = str(error).strip().splitlines()[0]
        if "external" in said.lower() or "model_path must not be empty" in said:
            raise BroughtError("its weights are in a file beside it: save it as one file") from error
        raise BroughtError(f"ONNX Runtime {onnxruntime.__version__} cannot load it: {said}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise BroughtError(f"it has {len(inputs)} inputs ({names}): export it with one, float32[rows, features]")
    (given,) = inputs
    if given.type != "tensor(float)" or len(given.shape) != 2:
        raise BroughtError(f"its input is a {given.type} of {given.shape}: export it with float32[rows, features]")
    if isinstance(given.shape[0], int):
        raise BroughtError(f"its input has {given.shape[0]} rows, always: export it with a dynamic first axis")
    if isinstance(given.shape[1], int):
        check_width(given.shape[1], feature_set)
    name = _chosen([(one.name, one.type) for one in session.get_outputs()], output)
    rows = np.nan_to_num(probe_rows(feature_set, 64))
    try:
        (values,) = session.run([name], {given.name: rows})
    except Exception as error:  # as above
        raise BroughtError(
            f"it does not take {len(feature_set)} features: {str(error).strip().splitlines()[0]}"
        ) from error
    if not isinstance(values, np.ndarray):
        raise BroughtError(f"its output {name!r} is no tensor: export it with `zipmap=False`")
    read, notes = _reading(values, rows, output_is)
    scored = {"input": given.name, "output": name, **read}
    return Brought("onnx", content, {"runtime": "onnx", "network": None, "scored": scored}, notes=notes)


def _chosen(outputs: Sequence[tuple[str, str]], wanted: str) -> str:
    """The output that is the score: the one that is named, else the only one of floats."""
    names = [name for name, _ in outputs]
    if wanted:
        if wanted not in names:
            raise BroughtError(f"it has no output {wanted!r}: --output is one of {', '.join(names)}")
        return wanted
    floats = [name for name, kind in outputs if kind in ("tensor(float)", "tensor(double)")]
    if len(floats) == 1:
        return floats[0]
    if not floats and any(kind.startswith("seq(map") for _, kind in outputs):
        raise BroughtError("its probabilities are a list of maps: export it with `zipmap=False`")
    if not floats:
        raise BroughtError(f"none of its outputs ({', '.join(names)}) holds floats: export it with its scores")
    raise BroughtError(f"it has {len(floats)} outputs of floats: name the score with --output {' or '.join(floats)}")


def _reading(
    values: NDArray[Any], rows: NDArray[np.float32], output_is: Output | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How an output is read, and what to tell of that.

    Args:
        values: The output for the rows.
        rows: float32[n, n_features].
        output_is: What one column is, if somebody said so.
    """
    columns = values.shape[1] if values.ndim == 2 else 1
    if values.ndim not in (1, 2) or len(values) != len(rows) or columns not in (1, 2):
        raise BroughtError(
            f"its output is {list(values.shape)} for {len(rows)} rows: it must be one score a row, or the probabilities"
            " of two classes"
        )
    finite = values[np.isfinite(values).reshape(len(rows), -1).all(axis=1)]
    within = len(finite) > 0 and bool(((finite >= -_NEAR_NUMBER) & (finite <= 1 + _NEAR_NUMBER)).all())
    if columns == 2:
        if not within or not np.allclose(finite.sum(axis=1), 1.0, atol=_SHARES_SUM):
            raise BroughtError(
                "its two columns are no probabilities of two classes, which sum to 1: export it with a softmax, or with"
                " one column, the log odds"
            )
        return {"column": 1, "is_probability": True, "fill": None}, ()
    is_probability = within if output_is is None else output_is == "probability"
    if is_probability and not within:
        low, high = (math.nan, math.nan) if not len(finite) else (float(finite.min()), float(finite.max()))
        raise BroughtError(f"its scores are from {low:.3g} to {high:.3g}, no probabilities: say --output-is margin")
    said = () if output_is else (f"its output is taken for a {'probability' if is_probability else 'margin'}",)
    return {"column": 0, "is_probability": is_probability, "fill": None}, said
