"""When a TorchServe counts as ready; the server here is real, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from local.stack.errors import NotReadyError
from local.stack.parts import torchserve
from local.stack.ports import LOOPBACK
from pretrade.wire.torchserve import inference_pb2, inference_pb2_grpc


class Models(inference_pb2_grpc.InferenceAPIsServiceServicer):
    """Answers, or has no worker, and notes how long its callers would wait."""

    def __init__(self) -> None:
        self.has_worker = True
        self.patience: list[float] = []

    def Predictions(self, request: inference_pb2.PredictionsRequest, context: Any) -> inference_pb2.PredictionResponse:
        self.patience.append(context.time_remaining())
        if not self.has_worker:
            context.abort(grpc.StatusCode.INTERNAL, f'Model "{request.model_name}" has no worker')
        return inference_pb2.PredictionResponse()


@pytest.fixture
def models() -> Models:
    return Models()


@pytest.fixture
def port(models: Models) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(models, server)
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    server.start()
    yield port
    server.stop(None)


def test_it_is_ready_when_it_scores_and_not_before(models: Models, port: int) -> None:
    models.has_worker = False
    with pytest.raises(NotReadyError, match='INTERNAL: Model "champion" has no worker'):
        torchserve.ready(port, "champion")
    models.has_worker = True
    torchserve.ready(port, "champion")


def test_a_first_answer_that_takes_seconds_is_not_cancelled_as_that_would_end_the_worker(
    models: Models, port: int
) -> None:
    torchserve.ready(port, "champion")
    (patience,) = models.patience
    assert patience > 10.0
