"""A network in ONNX gives the margins that Torch gives."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from feature_cache.features import MF1
from torchserve import portable
from torchserve.brought.reading import probe_rows
from torchserve.dataset import Samples
from torchserve.handler import calibrated, margin_of, onnx_margin, torch_margin
from torchserve.training import TrainedModel


def test_a_network_in_onnx_scores_as_torch_does(models: dict[str, TrainedModel], samples: Samples) -> None:
    model = models["challenger"]
    assert model.network is not None
    about = portable.described(model.weights, model.network)
    in_onnx = onnx_margin(base64.b64decode(about["model"]), about["scored"])
    in_torch = torch_margin(model.weights, model.network)
    extreme = np.array([[3e38], [-3e38], [0.0], [np.nan]], np.float32).repeat(len(MF1), axis=1)
    rows = np.concatenate([samples.rows[:2_000], probe_rows(MF1, 2_000), extreme])
    assert np.isnan(rows).any()
    found, wanted = (calibrated(margin(rows), model.slope, model.intercept) for margin in (in_onnx, in_torch))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert np.ptp(found) > 0.1


def test_the_same_network_gives_the_same_bytes(models: dict[str, TrainedModel]) -> None:
    model = models["challenger"]
    assert model.network is not None
    assert portable.network_as_onnx(model.weights, model.network) == portable.network_as_onnx(
        model.weights, model.network
    )


@pytest.mark.parametrize("name", ["champion", "challenger"])
def test_an_archive_holds_its_network_in_onnx_and_nothing_where_it_has_none(name: str, store: Path) -> None:
    described = json.loads((store / f"{name}.json").read_text())
    if name == "champion":
        assert described["onnx"] is None
        return
    canned = described["canned"]
    rows = np.frombuffer(base64.b64decode(canned["rows"]), "<f4").reshape(-1, len(MF1))
    held = described["onnx"]
    as_brought = {"runtime": "onnx", "network": None, "scored": held["scored"]}
    margins = margin_of(as_brought, base64.b64decode(held["model"]))(rows)
    scores = calibrated(margins, **described["calibration"])
    np.testing.assert_allclose(scores, canned["scores"], rtol=0, atol=1e-6)
