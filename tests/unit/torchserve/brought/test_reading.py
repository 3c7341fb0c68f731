"""A stranger's model gives here the scores that it gives there, or is refused with what to change."""

from __future__ import annotations

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
from sklearn.linear_model import LinearRegression, LogisticRegression
from support.brought_models import NAMES, Trained
from support.labelled_rows import labelled_rows

from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.features import MF1
from torchserve.brought.errors import BroughtError
from torchserve.brought.reading import Kind, check_undefined, probe_rows, prove, read_model
from torchserve.handler import calibrated

Rows = NDArray[np.float32]
Onnx = Callable[..., Path]
SMALL = FeatureSet("small", (Feature("spread_bps", "bps", "One."), Feature("ofi_1s", "", "Two.", signed=True)))


def rows_to_prove() -> Rows:
    """10,000 rows: some like those of training, some of all magnitudes, with nothing and all of it undefined."""
    return np.concatenate([labelled_rows(6_000, 9)[0], probe_rows(MF1, 4_000)])


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_rows_score_as_in_the_library_that_trained_the_model(
    name: str, trained: dict[str, Trained]
) -> None:
    model = trained[name]
    brought = read_model(model.path, model.kind, MF1)
    # A network's sums of millions are rounded otherwise by another library. A conversion of ours is held against them.
    rows = rows_to_prove() if brought.original else labelled_rows(10_000, 9)[0]
    assert len(rows) == 10_000
    assert np.isnan(rows).any()
    medians = np.nanmedian(rows, axis=0).astype(np.float32)
    if not model.takes_undefined:
        with pytest.raises(BroughtError, match="gives no score where 'spread_bps' is undefined"):
            check_undefined(brought, MF1)
        brought = brought.filling(medians)
    served = calibrated(brought.margin()(rows), 1.0, 0.0)
    np.testing.assert_allclose(served, model.expected(rows, medians), rtol=0, atol=1e-6)
    assert np.ptp(served) > 0.5
    assert prove(brought, rows) <= 1e-6
    check_undefined(brought, MF1)


def test_a_traced_network_gives_its_own_margins(made: dict[str, Path]) -> None:
    brought = read_model(made["net.pt"], "torchscript", MF1, output_is="margin")
    rows = np.nan_to_num(rows_to_prove()[:200])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        load: Any = torch.jit.load
        expected = load(made["net.pt"])(torch.from_numpy(rows)).numpy()[:, 0]
    np.testing.assert_array_equal(brought.margin()(rows), expected)
    with pytest.raises(BroughtError, match="gives no score where 'spread_bps' is undefined"):
        check_undefined(brought, MF1)
    check_undefined(brought.filling(np.zeros(len(MF1), np.float32)), MF1)


def test_a_conversion_that_loses_the_ways_of_undefined_values_is_refused(made: dict[str, Path]) -> None:
    forest = read_model(made["forest.joblib"], "sklearn", MF1)
    with pytest.raises(BroughtError, match=r"on rows with undefined features \(NaN\) only: put an imputer"):
        prove(forest, rows_to_prove())
    assert prove(forest.filling(np.zeros(len(MF1), np.float32)), rows_to_prove()) <= 1e-6


def test_an_estimator_that_the_converter_does_not_know_is_refused(made: dict[str, Path]) -> None:
    with pytest.raises(BroughtError, match="skl2onnx cannot convert a HistGradientBoostingClassifier"):
        read_model(made["histogram.joblib"], "sklearn", MF1)


def test_a_model_in_onnx_is_read_by_its_only_output_of_floats(onnx_file: Onnx) -> None:
    weights = np.linspace(-1, 1, len(MF1), dtype=np.float32)[:, None]
    path = onnx_file([("MatMul", ["row", "w"], ["sum"])], [("sum", ["rows", 1])], weights={"w": weights})
    brought = read_model(path, "onnx", MF1)
    assert brought.notes == ("its output is taken for a margin",)
    rows = np.nan_to_num(probe_rows(MF1, 50)) / 1e6
    np.testing.assert_allclose(brought.margin()(rows), (rows @ weights)[:, 0], rtol=1e-5, atol=1e-5)
    nodes = [("MatMul", ["row", "w"], ["sum"]), ("Sigmoid", ["sum"], ["share"])]
    path = onnx_file(nodes, [("share", ["rows", 1])], weights={"w": weights})
    share = read_model(path, "onnx", MF1)
    assert share.notes == ("its output is taken for a probability",)
    np.testing.assert_allclose(share.margin()(rows), (rows @ weights)[:, 0], rtol=1e-4, atol=1e-4)


def test_a_model_that_never_gives_a_score_is_not_said_to_miss_what_is_undefined(onnx_file: Onnx) -> None:
    nodes = [("MatMul", ["row", "w"], ["sum"]), ("Sub", ["sum", "sum"], ["nothing"]), ("Log", ["nothing"], ["out"])]
    path = onnx_file(nodes, [("out", ["rows", 1])], weights={"w": np.ones((len(MF1), 1), np.float32)})
    brought = read_model(path, "onnx", MF1, output_is="margin")
    with pytest.raises(BroughtError, match="no finite score for a row of zeros, in which nothing is undefined"):
        check_undefined(brought, MF1)


def test_what_a_model_in_onnx_takes_and_gives_is_checked(onnx_file: Onnx, tmp_path: Path) -> None:
    weights = np.ones((len(MF1), 1), np.float32)
    both = [("MatMul", ["row", "w"], ["sum"]), ("Sigmoid", ["sum"], ["share"])]
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"width": 24}, {}, "takes 24 features, mf1/.* has 25"),
        ({"rows": 1}, {}, "has 1 rows, always: export it with a dynamic first axis"),
        ({"outputs": [("sum", ["rows", 1]), ("share", ["rows", 1])]}, {}, "name the score with --output sum or share"),
        ({}, {"output": "other"}, "has no output 'other': --output is one of sum"),
        ({}, {"output_is": "probability"}, "no probabilities: say --output-is margin"),
    ]
    for changed, asked, message in cases:
        width = changed.get("width", len(MF1))
        arguments: dict[str, Any] = {"outputs": [("sum", ["rows", 1])], **changed, "weights": {"w": weights[:width]}}
        with pytest.raises(BroughtError, match=message):
            read_model(onnx_file(both, **arguments), "onnx", MF1, **asked)
    three = onnx_file([("MatMul", ["row", "w"], ["out"])], [("out", ["rows", 3])], weights={"w": weights.repeat(3, 1)})
    with pytest.raises(BroughtError, match="must be one score a row, or the probabilities of two classes"):
        read_model(three, "onnx", MF1)
    two = onnx_file([("MatMul", ["row", "w"], ["out"])], [("out", ["rows", 2])], weights={"w": weights.repeat(2, 1)})
    with pytest.raises(BroughtError, match="which sum to 1: export it with a softmax"):
        read_model(two, "onnx", MF1)
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(BroughtError, match="cannot load it"):
        read_model(tmp_path / "no.onnx", "onnx", MF1)
    with pytest.raises(BroughtError, match="cannot be read: No such file"):
        read_model(tmp_path / "nothing.onnx", "onnx", MF1)


@pytest.mark.parametrize("kind", ["lightgbm", "xgboost", "sklearn", "torchscript"])
def test_a_file_of_something_else_is_refused_with_how_to_save_it(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(BroughtError, match="save it with"):
        read_model(tmp_path / "other", kind, MF1)


def test_other_columns_than_the_sets_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    for name, kind in (("trees.txt", "lightgbm"), ("trees.ubj", "xgboost"), ("pipeline.joblib", "sklearn")):
        with pytest.raises(BroughtError, match=r"takes 25 features, small/.* has 2: train it on all columns"):
            read_model(made[name], kind, SMALL)  # type: ignore[arg-type]
    rows, labels = labelled_rows(200, 1, MF1)
    turned = lightgbm.Dataset(rows[:, :2], labels, feature_name=["ofi_1s", "spread_bps"])
    path = tmp_path / "turned.txt"
    lightgbm.train({"objective": "binary", "verbose": -1, "num_threads": 1}, turned, 2).save_model(path)
    with pytest.raises(BroughtError, match="column 1 is 'ofi_1s', that of small is 'spread_bps'"):
        read_model(path, "lightgbm", SMALL)


def test_what_gives_no_probability_is_refused(tmp_path: Path) -> None:
    rows, labels = labelled_rows(300, 1)
    rows = np.nan_to_num(rows)
    regression = lightgbm.train({"verbose": -1, "num_threads": 1}, lightgbm.Dataset(rows, labels.astype(float)), 2)
    regression.save_model(tmp_path / "regression.txt")
    with pytest.raises(BroughtError, match="its objective is regression: train it with binary"):
        read_model(tmp_path / "regression.txt", "lightgbm", MF1)
    xgboost.train({"nthread": 1}, xgboost.DMatrix(rows, labels), 2).save_model(tmp_path / "regression.ubj")
    with pytest.raises(BroughtError, match="its objective is reg:squarederror: train it with binary:logistic or"):
        read_model(tmp_path / "regression.ubj", "xgboost", MF1)
    joblib.dump(LinearRegression().fit(rows, labels), tmp_path / "line.joblib")
    with pytest.raises(BroughtError, match="a LinearRegression gives no probabilities: fit a classifier"):
        read_model(tmp_path / "line.joblib", "sklearn", MF1)
    three = LogisticRegression(max_iter=20).fit(rows[:, :1], np.arange(300) % 3)
    joblib.dump(three, tmp_path / "three.joblib")
    with pytest.raises(BroughtError, match="it knows 3 classes: fit it on a label of 0 and 1"):
        read_model(tmp_path / "three.joblib", "sklearn", MF1)


def test_trees_after_the_best_iteration_are_left_out(tmp_path: Path) -> None:
    rows, labels = labelled_rows(400, 1)
    matrix = xgboost.DMatrix(rows, labels)
    booster = xgboost.train({"objective": "binary:logistic", "nthread": 1}, matrix, 8)
    booster.set_attr(best_iteration="2")
    booster.save_model(tmp_path / "stopped.ubj")
    brought = read_model(tmp_path / "stopped.ubj", "xgboost", MF1)
    assert "best iteration, 2" in brought.notes[0]
    expected = booster.predict(matrix, iteration_range=(0, 3))
    np.testing.assert_allclose(calibrated(brought.margin()(rows), 1.0, 0.0), expected, rtol=0, atol=1e-6)
