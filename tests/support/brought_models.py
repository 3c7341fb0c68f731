"""Models that were trained elsewhere, a file of each kind, and what the library that trained each says of rows."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import lightgbm
import numpy as np
import torch
import xgboost
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from feature_cache.features import MF1
from support.labelled_rows import labelled_rows
from torchserve.brought.reading import Kind

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Trained:
    """A model in a file of the library that trained it."""

    kind: Kind
    path: Path
    scores: Callable[[Rows], NDArray[np.float64]]
    """Its own probabilities of rows, float64[n], by that library."""
    takes_undefined: bool = True
    """False where it gives no score if a feature is undefined."""

    def expected(self, rows: Rows, medians: Rows) -> NDArray[np.float64]:
        """The same, with these values in place of what is undefined where the model needs that."""
        given = rows if self.takes_undefined else np.where(np.isnan(rows), medians, rows).astype(np.float32)
        return self.scores(given)


def train_all(directory: Path) -> dict[str, Trained]:
    """A model of each kind, by its file's name; two of ONNX, as scikit-learn's and Torch's own exports write it."""
    rows, labels = labelled_rows(2_000, 1)
    return {
        model.path.name: model
        for model in (
            _lightgbm(directory / "trees.txt", rows, labels),
            _xgboost(directory / "trees.ubj", rows, labels),
            *_sklearn(directory, rows, labels),
            *_torch(directory, rows, labels),
        )
    }


def _lightgbm(path: Path, rows: Rows, labels: NDArray[np.bool_]) -> Trained:
    parameters = {"objective": "binary", "verbose": -1, "num_threads": 1, "num_leaves": 15}
    booster = lightgbm.train(parameters, lightgbm.Dataset(rows, labels), 25)
    booster.save_model(path)
    return Trained("lightgbm", path, lambda given: np.asarray(booster.predict(given, num_threads=1), np.float64))


def _xgboost(path: Path, rows: Rows, labels: NDArray[np.bool_]) -> Trained:
    matrix = xgboost.DMatrix(rows, labels, feature_names=list(MF1.names))
    booster = xgboost.train({"objective": "binary:logistic", "max_depth": 3, "nthread": 1}, matrix, 25)
    booster.save_model(path)

    def scores(given: Rows) -> NDArray[np.float64]:
        matrix = xgboost.DMatrix(given, feature_names=list(MF1.names), nthread=1)
        return booster.predict(matrix).astype(np.float64)

    return Trained("xgboost", path, scores)


def _sklearn(directory: Path, rows: Rows, labels: NDArray[np.bool_]) -> list[Trained]:
    """A regression and a forest, pickled, and the regression as its owner exported it to ONNX."""
    from skl2onnx import to_onnx  # noqa: PLC0415 - slow to import

    regression = make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression()).fit(rows, labels)
    forest = make_pipeline(SimpleImputer(), RandomForestClassifier(5, max_depth=4, random_state=1)).fit(rows, labels)
    for name, estimator in (("pipeline.joblib", regression), ("imputed.joblib", forest)):
        joblib.dump(estimator, directory / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = to_onnx(regression, rows[:1], options={"zipmap": False})
    (directory / "sklearn.onnx").write_bytes(exported.SerializeToString())
    of_regression: Any = lambda given: np.asarray(regression.predict_proba(given)[:, 1], np.float64)  # noqa: E731
    return [
        Trained("sklearn", directory / "pipeline.joblib", of_regression),
        Trained("sklearn", directory / "imputed.joblib", lambda given: np.asarray(forest.predict_proba(given)[:, 1])),
        Trained("onnx", directory / "sklearn.onnx", of_regression),
    ]


def _torch(directory: Path, rows: Rows, labels: NDArray[np.bool_]) -> list[Trained]:
    """A network as TorchScript, and as Torch exports it to ONNX: both give margins."""
    torch.manual_seed(1)
    scale = torch.from_numpy(np.nanstd(rows, axis=0).astype(np.float32))
    first = torch.nn.Linear(len(MF1), 8)
    network = torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.Linear(8, 1))
    given, wanted = torch.from_numpy(np.nan_to_num(rows)) / scale, torch.from_numpy(labels.astype(np.float32))
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        loss: Any = torch.nn.functional.binary_cross_entropy_with_logits(network(given)[:, 0], wanted)
        loss.backward()  # without types
        optimiser.step()
    with torch.no_grad():  # what was divided by is in the weights from now on
        first.weight /= scale
    network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is deprecated
        traced: Any = torch.jit.trace  # without types
        buffer = io.BytesIO()
        torch.jit.save(traced(network, torch.zeros(2, len(MF1))), buffer)
        (directory / "net.pt").write_bytes(buffer.getvalue())
        torch.onnx.export(
            network,
            (torch.zeros(2, len(MF1)),),
            directory / "torch.onnx",
            input_names=["row"],
            output_names=["margin"],
            dynamic_axes={"row": {0: "rows"}, "margin": {0: "rows"}},
            dynamo=False,
        )

    def scores(given: Rows) -> NDArray[np.float64]:
        with torch.inference_mode():
            return torch.sigmoid(network(torch.from_numpy(given))[:, 0].double()).numpy()

    return [Trained(kind, directory / name, scores, False) for kind, name in _OF_TORCH]


_OF_TORCH: tuple[tuple[Kind, str], ...] = (("torchscript", "net.pt"), ("onnx", "torch.onnx"))
NAMES = ("trees.txt", "trees.ubj", "pipeline.joblib", "imputed.joblib", "sklearn.onnx", "net.pt", "torch.onnx")
"""Of `train_all`'s files."""
