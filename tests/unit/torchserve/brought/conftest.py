"""Small models of each library, trained elsewhere as far as the product can tell, and rows that tell of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from support.brought_models import Trained, train_all
from support.labelled_rows import labelled_rows

from feature_cache.features import MF1

Rows = NDArray[np.float32]


@pytest.fixture(scope="session")
def trained_on() -> tuple[Rows, NDArray[np.bool_]]:
    return labelled_rows(2_000, 1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """A model of each kind, by the name of its file."""
    return train_all(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def made(trained: dict[str, Trained], trained_on: tuple[Rows, NDArray[np.bool_]]) -> dict[str, Path]:
    """Their files, and those of two that are refused."""
    rows, labels = trained_on
    files = {name: model.path for name, model in trained.items()}
    directory = files["trees.txt"].parent
    estimators: dict[str, Any] = {
        "histogram.joblib": HistGradientBoostingClassifier(max_iter=10),
        "forest.joblib": RandomForestClassifier(5, max_depth=4, random_state=1),
    }
    for name, estimator in estimators.items():
        files[name] = directory / name
        joblib.dump(estimator.fit(rows, labels), files[name])
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
