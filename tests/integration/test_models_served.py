"""Real TorchServe processes score exactly as the handler does in this process."""

from __future__ import annotations

import gc
import json
import os
import signal
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import grpc
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from feature_cache import features
from feature_cache.sources.simulator import simulate
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.wire.torchserve.inference_pb2 import PredictionsRequest
from pretrade.wire.torchserve.inference_pb2_grpc import InferenceAPIsServiceStub
from torchserve.build import build_models
from torchserve.dataset import collect
from torchserve.handler import HEADER, ModelHandler

pytestmark = pytest.mark.stack

REPLICAS = {"champion": "primary", "challenger": "challenger"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    build_models(None, store, simulated_seconds=200)
    return store


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Stack]:
    settings = LocalSettings(dir=tmp_path_factory.mktemp("served"), model_store=store)
    with Stack(settings, parts=set(REPLICAS.values())) as stack:
        yield stack


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    """Real rows, with what is undefined at a start, and one of nothing but that."""
    rows = collect(simulate(8, ["ETHUSDT.SIM"], duration_seconds=60), "test").rows
    assert np.isnan(rows).any()
    return np.concatenate([rows, np.full((1, features.N_FEATURES), np.nan, dtype=np.float32)])


def predict(stack: Stack, model: str, packed: bytes) -> bytes:
    address = getattr(stack.endpoints, REPLICAS[model])
    with grpc.insecure_channel(address) as channel:
        request = PredictionsRequest(model_name=model, input={"input": packed})
        return InferenceAPIsServiceStub(channel).Predictions(request, timeout=30, wait_for_ready=True).prediction


@pytest.mark.parametrize("model", REPLICAS)
def test_served_scores_equal_those_in_process(
    model: str, stack: Stack, store: Path, rows: NDArray[np.float32], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TorchServe's package leaves a file open when it is imported
        from ts.context import Context  # noqa: PLC0415
    with zipfile.ZipFile(store / f"{model}.mar") as archive:
        archive.extractall(tmp_path)
    manifest = json.loads((tmp_path / "MAR-INF" / "MANIFEST.json").read_text())
    handler = ModelHandler()
    handler.initialize(Context(model, str(tmp_path), manifest, 1, None, "0.12.0"))
    gc.unfreeze()
    for batch in (rows[:1], rows[-1:], rows):
        answer = predict(stack, model, batch.astype("<f4").tobytes())
        _, count, version, *_ = HEADER.unpack_from(answer)
        assert count == len(batch)
        assert version.hex() == manifest["model"]["modelVersion"]
        served = np.frombuffer(answer, dtype="<f4", offset=HEADER.size)
        np.testing.assert_allclose(served, handler.score(batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("packed", [b"", bytes(99), bytes(101)])
def test_a_wrong_length_is_the_callers_error_and_harms_nothing(packed: bytes, stack: Stack) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        predict(stack, "champion", packed)
    call = cast("grpc.Call", refusal.value)
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert call.details().splitlines()[0] == f"`input` has {len(packed)} bytes, not a positive multiple of 100"
    assert len(predict(stack, "champion", bytes(100))) == HEADER.size + 4


def test_a_process_listens_on_loopback_only(stack: Stack) -> None:
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in stack["primary"].tree()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) == {"127.0.0.1"}


@pytest.mark.long
def test_a_worker_that_dies_is_replaced(stack: Stack) -> None:
    before = predict(stack, "challenger", bytes(100))
    (worker,) = [process for process in stack["challenger"].tree() if process.name().startswith("python")]
    os.kill(worker.pid, signal.SIGKILL)
    # The call that finds the worker dead fails, unless TorchServe did so first; the next one waits for its replacement.
    with suppress(grpc.RpcError):
        predict(stack, "challenger", bytes(100))
    assert predict(stack, "challenger", bytes(100)) == before
