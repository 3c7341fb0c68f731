"""Small models of each library, trained elsewhere as far as the product can tell, and rows that tell of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import lightgbm
import numpy as np
import pytest
import torch
import xgboost
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support.labelled_rows import labelled_rows

from feature_cache.features import MF1

Rows = NDArray[np.float32]


@pytest.fixture(scope="session")
def trained_on() -> tuple[Rows, NDArray[np.bool_]]:
    return labelled_rows(2_000, 1)


@pytest.fixture(scope="session")
def made(trained_on: tuple[Rows, NDArray[np.bool_]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each kind, by name."""
    rows, labels = trained_on
    directory = tmp_path_factory.mktemp("made")
    files = {name: directory / name for name in ("trees.txt", "trees.ubj", "net.pt")}
    parameters = {"objective": "binary", "verbose": -1, "num_threads": 1, "num_leaves": 15}
    lightgbm.train(parameters, lightgbm.Dataset(rows, labels), 25).save_model(files["trees.txt"])
    matrix = xgboost.DMatrix(rows, labels, feature_names=list(MF1.names))
    xgboost.train({"objective": "binary:logistic", "max_depth": 3, "nthread": 1}, matrix, 25).save_model(
        files["trees.ubj"]
    )
    estimators: dict[str, Any] = {
        "pipeline.joblib": make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression()),
        "histogram.joblib": HistGradientBoostingClassifier(max_iter=10),
        "imputed.joblib": make_pipeline(SimpleImputer(), RandomForestClassifier(5, max_depth=4, random_state=1)),
        "forest.joblib": RandomForestClassifier(5, max_depth=4, random_state=1),
    }
    for name, estimator in estimators.items():
        files[name] = directory / name
        joblib.dump(estimator.fit(rows, labels), files[name])
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Linear(len(MF1), 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is no longer worked on
        buffer = io.BytesIO()
        traced: Any = torch.jit.trace  # without types
        torch.jit.save(traced(network, torch.zeros(2, len(MF1))), buffer)
    files["net.pt"].write_bytes(buffer.getvalue())
    return files


Onnx = Callable[..., Path]


@pytest.fixture
def onnx_file(tmp_path: Path) -> Onnx:
    """Writes a model in ONNX that computes, of a row, a weighted sum."""

    def write(
        nodes: list[tuple[str, list[str], list[str]]],
        outputs: list[tuple[str, list[int | str]]],
        *,
        width: int | str = len(MF1),
        rows: int | str = "rows",
        weights: dict[str, Rows] | None = None,
    ) -> Path:
        from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

        given = helper.make_tensor_value_info("row", TensorProto.FLOAT, [rows, width])
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs]
        held = [numpy_helper.from_array(values, name) for name, values in (weights or {}).items()]
        graph = helper.make_graph([helper.make_node(*node) for node in nodes], "sum", [given], ends, held)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write
