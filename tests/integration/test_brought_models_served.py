"""A LightGBM model that was trained elsewhere is served by a real TorchServe, with LightGBM's own scores."""

from __future__ import annotations

from pathlib import Path

import grpc
import lightgbm
import numpy as np
import pytest
from support.labelled_rows import labelled_rows

from feature_cache.features import MF1
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.wire.torchserve.inference_pb2 import PredictionsRequest
from pretrade.wire.torchserve.inference_pb2_grpc import InferenceAPIsServiceStub
from server.inference.wire import parse_answer
from torchserve.brought.adding import Adding, add
from torchserve.brought.reading import read_model
from torchserve.export import write_archive

pytestmark = pytest.mark.stack


def test_a_brought_model_is_served_with_its_librarys_scores(tmp_path: Path) -> None:
    rows, labels = labelled_rows(1_000, 1)
    parameters = {"objective": "binary", "verbose": -1, "num_threads": 1}
    booster = lightgbm.train(parameters, lightgbm.Dataset(rows, labels), 20)
    booster.save_model(tmp_path / "trees.txt")
    added = add(read_model(tmp_path / "trees.txt", "lightgbm", MF1), None, Adding(MF1, threshold=0.5))
    version = write_archive(added, added.metadata, tmp_path / "store")
    asked = labelled_rows(300, 2)[0]
    assert np.isnan(asked).any()
    settings = LocalSettings(dir=tmp_path / "served", model_store=tmp_path / "store")
    with Stack(settings, parts={"primary"}) as stack, grpc.insecure_channel(str(stack.endpoints.primary)) as channel:
        request = PredictionsRequest(model_name="champion", input={"input": asked.astype("<f4").tobytes()})
        answer = InferenceAPIsServiceStub(channel).Predictions(request, timeout=30, wait_for_ready=True).prediction
    served = parse_answer("champion", len(asked), answer)
    assert served.model.version == version
    assert served.model.threshold == 0.5
    np.testing.assert_allclose(served.scores, booster.predict(asked, num_threads=1), rtol=0, atol=1e-6)
