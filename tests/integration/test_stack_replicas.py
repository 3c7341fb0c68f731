"""Real TorchServe processes in the embedded stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from feature_cache.features import N_FEATURES
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.wire.torchserve.inference_pb2 import PredictionsRequest
from pretrade.wire.torchserve.inference_pb2_grpc import InferenceAPIsServiceStub

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[Stack]:
    settings = LocalSettings(dir=tmp_path_factory.mktemp("replicas"), model_store=model_store)
    with Stack(settings, parts={"primary", "secondary", "challenger"}) as stack:
        yield stack


def predict(address: str | None, model: str) -> bytes:
    assert address is not None
    row = np.ones(N_FEATURES, dtype="<f4").tobytes()
    with grpc.insecure_channel(address) as channel:
        request = PredictionsRequest(model_name=model, input={"input": row})
        return InferenceAPIsServiceStub(channel).Predictions(request, timeout=5.0).prediction


@pytest.mark.long
def test_both_replicas_serve_the_same_champion_and_the_third_the_challenger(stack: Stack) -> None:
    endpoints = stack.endpoints
    champion = predict(endpoints.primary, "champion")
    assert champion == predict(endpoints.secondary, "champion")
    challenger = predict(endpoints.challenger, "challenger")
    assert len(challenger) == len(champion)
    assert challenger != champion


@pytest.mark.long
def test_killing_a_replica_ends_its_python_worker_and_a_restart_serves_the_same_address(stack: Stack) -> None:
    primary = stack["primary"]
    before = predict(stack.endpoints.primary, "champion")
    tree = primary.tree()
    assert {"java", "python"} <= {process.name().rstrip("0123456789.") for process in tree}
    primary.kill()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in tree)
    with pytest.raises(grpc.RpcError):
        predict(stack.endpoints.primary, "champion")
    assert stack.ended() == ["primary"]
    primary.start()
    assert stack.ended() == []
    assert predict(stack.endpoints.primary, "champion") == before


@pytest.mark.long
def test_a_stopped_replica_leaves_no_worker(stack: Stack) -> None:
    tree = stack["secondary"].tree()
    assert len(tree) > 1
    stack["secondary"].stop()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in tree)
    stack["secondary"].start()
