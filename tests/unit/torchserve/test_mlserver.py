"""A champion exported for other model servers predicts the calibrated score itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xgboost

from server.inference.oip import ModelDescription
from torchserve.dataset import Samples
from torchserve.handler import ModelHandler
from torchserve.mlserver import write_folder


def test_plain_xgboost_predicts_the_handlers_score(
    store: Path, load: Callable[[Path], ModelHandler], samples: Samples, tmp_path: Path
) -> None:
    assert write_folder(store / "champion.mar", tmp_path / "served") == "champion"
    # As MLServer's runtime loads and asks it.
    model = xgboost.XGBRegressor()
    model.load_model(tmp_path / "served" / "model.json")
    scores = load(store / "champion.mar").score(samples.rows)
    np.testing.assert_allclose(model.predict(samples.rows), scores, rtol=0, atol=1e-6)
    assert np.isnan(samples.rows).any()
    assert np.ptp(scores) > 0.1


def test_the_folder_names_the_version_it_was_made_of(store: Path, tmp_path: Path) -> None:
    write_folder(store / "champion.mar", tmp_path)
    settings = json.loads((tmp_path / "model-settings.json").read_text())
    described = ModelDescription.read(tmp_path / "champion.json")
    original = json.loads((store / "champion.json").read_text())
    assert settings["parameters"]["version"] == described.version == original["version"]
    assert described.threshold == original["threshold"]


def test_a_network_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only boosted trees"):
        write_folder(store / "challenger.mar", tmp_path)
