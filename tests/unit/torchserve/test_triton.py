"""A version in Triton's repository has the number, the names and the trees that the decision server goes by."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from server.inference.oip import ModelDescription, OpenInference, OpenInferenceSettings
from torchserve.dataset import Samples
from torchserve.handler import ModelHandler
from torchserve.mlserver import write_folder
from torchserve.triton import write_version


def test_a_version_lies_where_the_decision_server_expects_it(store: Path, tmp_path: Path) -> None:
    settings = OpenInferenceSettings.model_validate(
        {"version_names": "number", "input_name": "input__0", "output_name": "output__0"}
    )
    name, _, number = write_version(store / "champion.mar", tmp_path).partition("/")
    described = ModelDescription.read(tmp_path / f"{name}.json")
    codec = OpenInference(settings, described)
    assert number == codec.served_name(described.version)
    assert 0 < int(number) < 2**63
    config = json.loads((tmp_path / f"{name}.config.json").read_text())
    (tensor,), (output,) = config["input"], config["output"]
    features = len(described.feature_set)
    assert (tensor["name"], tensor["dims"], output["name"]) == (settings.input_name, [features], settings.output_name)
    assert "version_policy" not in config, "which the decision server puts there"
    text = (tmp_path / name / "config.pbtxt").read_text()
    assert f'default_model_filename: "{config["default_model_filename"]}"' in text
    assert re.search(r'name: "input__0" data_type: TYPE_FP32 dims: \[ (\d+) \]', text)[1] == str(features)  # type: ignore[index]
    assert "version_policy: { all {} }" in text
    write_folder(store / "champion.mar", tmp_path / "mlserver")
    trees = (tmp_path / name / number / "xgboost.json").read_text()
    assert json.loads(trees) == json.loads((tmp_path / "mlserver" / "model.json").read_text())


def test_a_network_of_ours_goes_there_in_onnx(
    store: Path, load: Callable[[Path], ModelHandler], samples: Samples, tmp_path: Path
) -> None:
    written = tmp_path / write_version(store / "challenger.mar", tmp_path)
    session = onnxruntime.InferenceSession(written / "model.onnx")
    (scores,) = session.run(["output__0"], {"input__0": samples.rows})
    np.testing.assert_allclose(scores[:, 0], load(store / "challenger.mar").score(samples.rows), rtol=0, atol=1e-6)
    assert np.isnan(samples.rows).any()
