"""Every message TorchServe 0.12 was seen to send over gRPC, and its class."""

from __future__ import annotations

import grpc
import pytest
from grpc import StatusCode

from server.inference.outcome import Outcome, classify

NO_WORKER = (
    'Model "champion" has no worker to serve inference request. Please use scale workers API to add workers. '
    "If this is a sequence inference, please check if it is closed, or expired"
)


@pytest.mark.parametrize(
    ("code", "details", "outcome"),
    [
        # Queue full and no worker are refused at once, in the same words.
        (StatusCode.INTERNAL, NO_WORKER, Outcome.OVERLOAD),
        (StatusCode.INTERNAL, f"{NO_WORKER}\norg.pytorch.serve.http.ServiceUnavailableException", Outcome.OVERLOAD),
        (StatusCode.RESOURCE_EXHAUSTED, "too many requests", Outcome.OVERLOAD),
        # The worker died: under a call, when idle, by its response timeout, or by an answer too large for TorchServe.
        (StatusCode.INTERNAL, "Worker died.", Outcome.MODEL_ERROR),
        (StatusCode.RESOURCE_EXHAUSTED, "Worker died.", Outcome.MODEL_ERROR),
        # The handler raised, or returned what cannot be sent.
        (StatusCode.UNAVAILABLE, "Prediction failed", Outcome.MODEL_ERROR),
        (StatusCode.UNAVAILABLE, "Prediction failed\norg.pytorch.serve.util.X", Outcome.MODEL_ERROR),
        (StatusCode.UNAVAILABLE, "Invalid model predict output", Outcome.MODEL_ERROR),
        (StatusCode.UNAVAILABLE, "number of batch response mismatched", Outcome.MODEL_ERROR),
        (StatusCode.UNAVAILABLE, "Unsupported model output data type.", Outcome.MODEL_ERROR),
        (StatusCode.INTERNAL, "Out of resources", Outcome.MODEL_ERROR),
        # Not the model that was asked for.
        (StatusCode.INTERNAL, "Model not found: nope", Outcome.MODEL_ERROR),
        (StatusCode.INTERNAL, "Parameter model_name is required.", Outcome.MODEL_ERROR),
        (StatusCode.INTERNAL, "Model version: 9 does not exist for model: champion", Outcome.MODEL_ERROR),
        # Our own handler: the model's rows are not as long as ours.
        (StatusCode.INVALID_ARGUMENT, "`input` has 100 bytes, not a positive multiple of 96", Outcome.MODEL_ERROR),
        # A request beyond TorchServe's limit is reset by it: nobody here cancelled.
        (
            StatusCode.CANCELLED,
            "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))",
            Outcome.TRANSPORT,
        ),
        # The connection.
        (
            StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:7070: Failed to connect to remote "
            "host: Connection refused",
            Outcome.TRANSPORT,
        ),
        (StatusCode.UNAVAILABLE, "Stream removed (recvmsg:Connection reset by peer (104))", Outcome.TRANSPORT),
        (StatusCode.UNAVAILABLE, "Socket closed", Outcome.TRANSPORT),
        (
            StatusCode.UNAVAILABLE,
            "Stream removed (Socket closed (GOAWAY received; Error code: 11; Debug Text: too_many_pings))",
            Outcome.TRANSPORT,
        ),
        (StatusCode.UNKNOWN, "Stream removed", Outcome.TRANSPORT),
        (StatusCode.UNAVAILABLE, "Stream removed (ping timeout)", Outcome.TRANSPORT),
        (
            StatusCode.INTERNAL,
            "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))",
            Outcome.TRANSPORT,
        ),
        # Time.
        (StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", Outcome.TIMEOUT),
        (StatusCode.DEADLINE_EXCEEDED, "Stream removed (RST_STREAM (…))", Outcome.TIMEOUT),
        # Our own end refused an answer of 10 MB; the code is that of a full queue.
        (
            StatusCode.RESOURCE_EXHAUSTED,
            "CLIENT: Received message larger than max (10485760 vs. 65536)",
            Outcome.BAD_ANSWER,
        ),
        # Other servers: MLServer when its model raised, Triton when it is full or has no model.
        (StatusCode.UNKNOWN, "Unexpected <class 'ValueError'>: a model's mistake", Outcome.MODEL_ERROR),
        (StatusCode.UNAVAILABLE, "[request id: 1] Exceeds maximum queue size", Outcome.OVERLOAD),
        (StatusCode.UNAVAILABLE, "Request for unknown model: 'champion' is not found", Outcome.MODEL_ERROR),
        (StatusCode.NOT_FOUND, "Model champion not found", Outcome.MODEL_ERROR),
        # Not TorchServe at all.
        (StatusCode.UNIMPLEMENTED, "Method not found!", Outcome.MODEL_ERROR),
        (StatusCode.INTERNAL, "", Outcome.MODEL_ERROR),
    ],
)
def test_a_failed_call_is_classed_by_its_meaning(code: grpc.StatusCode, details: str, outcome: Outcome) -> None:
    assert classify(code, details) is outcome


def test_only_the_first_line_counts_since_the_second_is_a_java_class() -> None:
    assert classify(StatusCode.INTERNAL, "Something\nWorker died. has no worker to serve") is Outcome.MODEL_ERROR
