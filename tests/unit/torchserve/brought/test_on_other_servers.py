"""Brought models for model servers that know nothing of pretrade: their output is the score, or they are refused."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import xgboost
from support.brought_models import NAMES, Trained
from support.labelled_rows import labelled_rows

from feature_cache.features import MF1
from torchserve.brought.adding import Added, Adding, add
from torchserve.brought.combining import Part, combine
from torchserve.brought.reading import read_model
from torchserve.export import write_archive
from torchserve.handler import ModelHandler, margin_of
from torchserve.mlserver import write_folder
from torchserve.portable import scoring
from torchserve.triton import write_version

Load = Callable[[Path], ModelHandler]
ROWS = labelled_rows(400, 2)[0]
MEDIANS = np.nanmedian(ROWS, axis=0).astype(np.float32)


def added(model: Trained, slope: float = 1.3) -> Added:
    """The model, with a calibration that would show if it was left out."""
    brought = read_model(model.path, model.kind, MF1)
    found = add(brought if model.takes_undefined else brought.filling(MEDIANS), None, Adding(MF1, threshold=0.5))
    found.metadata["calibration"] = {"slope": slope, "intercept": -0.2}
    rows = np.frombuffer(base64.b64decode(found.metadata["canned"]["rows"]), "<f4").reshape(-1, len(MF1))
    margins = margin_of(found.metadata, found.weights)(rows)
    scores = 1 / (1 + np.exp(-(slope * margins.astype(np.float64) - 0.2)))
    found.metadata["canned"]["scores"] = scores.tolist()
    return found


def archive_of(made: Added, directory: Path) -> Path:
    version = write_archive(made, made.metadata, directory, install=False)
    return directory / "versions" / f"{version}.mar"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "net.pt"])
def test_what_triton_is_given_says_the_handlers_score(
    name: str, trained: dict[str, Trained], tmp_path: Path, load: Load
) -> None:
    archive = archive_of(added(trained[name]), tmp_path)
    expected = load(archive).score(ROWS)
    written = tmp_path / "repository" / write_version(archive, tmp_path / "repository")
    config = json.loads((tmp_path / "repository" / "champion.config.json").read_text())
    if trained[name].kind == "xgboost":
        booster = xgboost.Booster(model_file=str(written / config["default_model_filename"]))
        scores = booster.inplace_predict(ROWS, missing=np.nan)
    else:
        session = onnxruntime.InferenceSession(written / config["default_model_filename"])
        (scores,) = session.run([config["output"][0]["name"]], {config["input"][0]["name"]: ROWS})
        assert scores.shape == (len(ROWS), 1), "each row has one, as the configuration says"
    np.testing.assert_allclose(scores.ravel(), expected, rtol=0, atol=1e-6)
    assert np.isnan(ROWS).any()
    assert np.ptp(expected) > 0.1
    assert (config["backend"] == "fil") == (trained[name].kind == "xgboost")
    text = (tmp_path / "repository" / "champion" / "config.pbtxt").read_text()
    assert f'backend: "{config["backend"]}"' in text
    assert f'default_model_filename: "{config["default_model_filename"]}"' in text


def test_what_cannot_go_there_is_refused_with_what_to_do(trained: dict[str, Trained], tmp_path: Path) -> None:
    network, trees = added(trained["net.pt"]), added(trained["trees.txt"])
    parts = [Part(name * 8, one.metadata, one.weights, 1.0) for name, one in (("aa", trees), ("bb", network))]
    ensemble = combine("mean", parts, None, Adding(MF1, threshold=0.5))
    for one, kind in ((network, "torchscript"), (ensemble, "ensemble")):
        with pytest.raises(ValueError, match=f"no ONNX of a model of the kind {kind}: serve it by TorchServe"):
            write_version(archive_of(one, tmp_path), tmp_path / "repository")
    for one, kind in ((network, "torchscript"), (ensemble, "ensemble"), (trees, "lightgbm")):
        sentence = re.escape(
            f"kind {kind}: MLServer gets only boosted trees of XGBoost, for it has no runtime for ONNX"
        )
        with pytest.raises(ValueError, match=sentence):
            write_folder(archive_of(one, tmp_path), tmp_path / "folder")
    assert not (tmp_path / "repository").exists()
    assert not (tmp_path / "folder").exists()


def test_mlserver_is_given_brought_trees_of_xgboost(trained: dict[str, Trained], tmp_path: Path, load: Load) -> None:
    archive = archive_of(added(trained["trees.ubj"]), tmp_path)
    write_folder(archive, tmp_path / "folder")
    model = xgboost.XGBRegressor()
    model.load_model(tmp_path / "folder" / "model.json")
    np.testing.assert_allclose(model.predict(ROWS), load(archive).score(ROWS), rtol=0, atol=1e-6)


def test_versions_of_one_model_share_a_backend(trained: dict[str, Trained], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    trees = archive_of(added(trained["trees.ubj"]), tmp_path)
    in_onnx = [archive_of(added(trained["trees.txt"], slope), tmp_path) for slope in (1.0, 1.1)]
    first = write_version(trees, repository)
    write_version(trees, repository)
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="run by fil and take 25 features, this one by onnxruntime"):
        write_version(in_onnx[0], repository)
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    for archive in in_onnx:
        write_version(archive, repository, "other")
    assert (repository / first / "xgboost.json").exists()
    assert len([path for path in (repository / "other").iterdir() if path.is_dir()]) == 2


def test_scores_that_are_not_the_archives_are_never_written(trained: dict[str, Trained]) -> None:
    made = added(trained["trees.txt"])
    made.metadata["canned"]["scores"][0] += 0.01
    with pytest.raises(ValueError, match=r"its scores are up to 0\.01 from those of its archive"):
        scoring(made.metadata, made.weights)


def test_an_opset_before_the_operators_that_are_added_is_named(trained: dict[str, Trained]) -> None:
    import onnx  # noqa: PLC0415 - slow to import

    made = added(trained["torch.onnx"])
    model = onnx.load_from_string(made.weights)
    model.opset_import[0].version = 8
    with pytest.raises(ValueError, match="its opset is 8: export it with 9 or a later one"):
        scoring(made.metadata, model.SerializeToString())
